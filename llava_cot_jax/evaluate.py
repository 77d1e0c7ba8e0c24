"""Measure the accuracy of a checkpoint and a search on questions whose right answers are known, or a verifier.

llava-cot evaluate --benchmark shapes --limit 200 --search majority_vote --output runs/shapes_majority
llava-cot evaluate --benchmark FILE.jsonl --checkpoint DIR_OR_HUB_ID --search stage_beam --output runs/mine
llava-cot evaluate --benchmark mmstar --data MMStar.tsv --checkpoint DIR_OR_HUB_ID --output runs/mmstar
llava-cot evaluate --benchmark shapes --limit 200 --compare greedy,majority_vote:4,stage_beam:4 --output runs/compared
llava-cot evaluate --values runs/values_before runs/values_after --output runs/verifier
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.answering_model import AnsweringModel, add_model_options, check_mesh_sizes
from llava_cot_jax.answering_processes import add_process_options, complete_job, run_in_group
from llava_cot_jax.checks import check_int
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.benchmarks.grader import KEY_VARIABLE, Grader
from llava_cot_jax.evaluation.benchmarks.published import PROMPTS, PUBLISHED_BENCHMARKS
from llava_cot_jax.evaluation.comparison.against import OtherAnswers
from llava_cot_jax.evaluation.comparison.job import ComparisonJob
from llava_cot_jax.evaluation.comparison.methods import read_methods
from llava_cot_jax.evaluation.comparison.options import add_comparison_options, check_comparison_options
from llava_cot_jax.evaluation.comparison.report import report_against, report_comparison
from llava_cot_jax.evaluation.job import RESULT, EvaluationJob
from llava_cot_jax.evaluation.matching import MATCHES
from llava_cot_jax.evaluation.question_sets import BENCHMARKS, EvaluationSet, Matching, open_benchmark
from llava_cot_jax.evaluation.verifier.report import report_verifiers
from llava_cot_jax.files import check_file_writable, write_json
from llava_cot_jax.hosts.lifeline import Lifeline
from llava_cot_jax.hosts.process_group import ProcessGroup
from llava_cot_jax.paths import as_path, writing_errors
from llava_cot_jax.search.options import add_arguments, check_verifier_adapter, strategy_of, strategy_or_sampling
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.request_options import add_weight_options
from llava_cot_jax.stage_format import StageFormat


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An argument, a file or a checkpoint that cannot be used, before anything expensive starts.
    """
    parser = _parser()
    run_in_group("evaluate", parser, sys.argv[1:] if argv is None else argv, partial(_evaluate, parser))


def _evaluate(parser: cli.Parser, options: Any, group: ProcessGroup, lifeline: Lifeline | None) -> None:
    """Measure verifiers, or answer the questions that have no answer yet, and print the result.

    Args:
        parser: Parser of the options.
        options: Options of the command.
        group: Processes of the run.
        lifeline: Bond of the processes that have one model over all their devices; None where each has its own.
    """
    if options["values"] is not None:
        _check_values_options(parser, options)
        if group.index == 0:
            report_verifiers(options["values"], options.output, Console(highlight=False))
            print(f"wrote the result and its plot to {as_path(options.output)}", file=sys.stderr)
        return
    evaluation = _check(options, group)
    complete_job(evaluation.job, evaluation.model, group, lifeline, evaluation.fields)
    if group.index == 0:
        evaluation.report()
        evaluation.job.check_answered()


def _check_values_options(parser: cli.Parser, options: Any) -> None:
    """Check that nothing is asked beside the measures of verifiers.

    Raises:
        UserError: An option has no meaning with ``--values``, or this names no folder.
    """
    if not options["values"]:
        raise UserError("--values names no folder: give one that llava-cot rollout has written")
    for name in parser.given(options):
        if name not in ("values", "output", "config"):
            raise UserError(f"--{name} has no meaning with --values, which asks no questions: leave one of them out")


@dataclass(frozen=True)
class _Evaluation:
    """Arguments that can be used, as far as that is known without the model's processor."""

    options: Any
    model: AnsweringModel
    job: EvaluationJob | ComparisonJob
    folder: Path
    other: OtherAnswers | None

    def fields(self) -> dict[str, str]:
        """Return what must be the same in processes that share a model, by name."""
        own = (
            "hosts",
            "checkpoint",
            "adapter",
            "verifier_adapter",
            "config",
            "benchmark",
            "data",
            "grader",
            "output",
            "page",
            "against",
        )
        given = {name: str(value) for name, value in vars(self.options).items() if name not in own}
        return given | self.job.fields()

    def report(self) -> None:
        """Write the result, and print it."""
        console = Console(highlight=False)
        if isinstance(self.job, ComparisonJob):
            page = None if self.options.page is None else as_path(self.options.page)
            report_comparison(self.job, self.folder, console, page)
        else:
            self._report_evaluation(self.job, console)
        if self.options.page is not None:
            print(f"wrote the page to {self.options.page}", file=sys.stderr)
        print(f"wrote the answers and the result to {self.folder}", file=sys.stderr)

    def _report_evaluation(self, job: EvaluationJob, console: Console) -> None:
        """Write the result of one search, and print it."""
        result, path = job.report(), self.folder / RESULT
        with writing_errors(path):
            write_json(path, result)
        job.show(result, console)
        if self.other:
            report_against(result, self.options.output, self.other.match(job.scored), self.folder, console)
        if self.options.page is not None:
            from llava_cot_jax.evaluation.page import write_evaluation_page

            format = StageFormat.load(self.options.format)
            write_evaluation_page(as_path(self.options.page), result, job.rows, job.scored, format)


def _check(options: Any, group: ProcessGroup) -> _Evaluation:
    """Check the arguments and the files before anything slow is imported.

    Raises:
        UserError: One of them cannot be used.
    """
    if options.benchmark is None:
        raise UserError("give --benchmark, whose questions are asked, or --values, folders of values and scores")
    format = StageFormat.load(options.format)
    check_comparison_options(options)
    methods = [] if options.compare is None else read_methods(options)
    strategy = None if methods else strategy_of(strategy_or_sampling(options), options.max_new_tokens, format)
    check_verifier_adapter(options, [method.strategy for method in methods] if strategy is None else [strategy])
    check_int("slots", options.slots)
    check_mesh_sizes(options)
    JudgePrompts.load(options.judge_prompts)
    questions = None if options.benchmark in PUBLISHED_BENCHMARKS else _own_questions(options)
    job_of = _published_job(options) if questions is None else _own_job(options, questions, is_comparison=bool(methods))
    other = OtherAnswers(options.against, questions) if questions and options.against is not None else None
    model = AnsweringModel.find(options)
    folder = as_path(options.output)
    if options.page is not None and group.index == 0:
        check_file_writable(as_path(options.page))
    job = job_of(folder, methods or strategy, model, writes=group.index == 0)
    if isinstance(job, EvaluationJob):
        job.check_judge()
    return _Evaluation(options, model, job, folder, other)


def _own_questions(options: Any) -> EvaluationSet:
    """Return the questions to ask, other than those of published benchmarks.

    Raises:
        UserError: An argument or a file cannot be used.
    """
    for name in ("data", "prompts", "grader.url", "grader.model"):
        if options[name] is not None:
            raise UserError(f"--{name} needs a published benchmark: {', '.join(PUBLISHED_BENCHMARKS)}")
    matching = Matching(options.match, options.tolerance)
    return open_benchmark(options.benchmark, options.limit, matching, options.seed)


def _own_job(
    options: Any, questions: EvaluationSet, *, is_comparison: bool
) -> Callable[..., EvaluationJob | ComparisonJob]:
    """Return what makes the job of questions other than those of published benchmarks."""
    return partial(ComparisonJob if is_comparison else EvaluationJob, options, questions)


def _published_job(options: Any) -> Callable[..., EvaluationJob]:
    """Check what is asked of a published benchmark, and return what makes the job of it.

    Raises:
        UserError: An argument or a file cannot be used.
    """
    from llava_cot_jax.evaluation.benchmarks.published_job import PublishedJob
    from llava_cot_jax.evaluation.benchmarks.question_tables import read_published

    name = options.benchmark
    for option in ("compare", "against"):
        if options[option] is not None:
            raise UserError(f"--{option} needs questions that are right or wrong one by one, not --benchmark {name}")
    benchmark = PUBLISHED_BENCHMARKS[name]
    if options.data is None:
        raise UserError(f"--benchmark {name} needs --data: its published file, {benchmark.dataset}.tsv")
    for option in ("match", "tolerance"):
        if options[option]:
            raise UserError(f"--{option} has no meaning with --benchmark {name}, which VLMEvalKit scores")
    if options.limit is not None:
        check_int("limit", options.limit)
    grader = Grader.from_options(options.grader.url, options.grader.model)
    if grader is None and benchmark.scorer.needs_judge:
        raise UserError(
            f"--benchmark {name} is graded by a judge: give --grader.url and --grader.model, a chat endpoint and the "
            "name of its model"
        )
    questions = read_published(name, options.data, options.limit, options.prompts or PROMPTS[0], options.seed)
    return partial(PublishedJob, options, questions, grader=grader)


def _parser() -> cli.Parser:
    parser = cli.Parser("evaluate")
    _add_evaluation_options(parser)
    add_model_options(parser)
    add_arguments(parser)
    add_comparison_options(parser)
    add_weight_options(parser)
    add_process_options(parser)
    return parser


def _add_evaluation_options(parser: cli.Parser) -> None:
    add = parser.add_argument
    add(
        "--benchmark",
        type=str,
        help=f"Questions to ask: {', '.join(BENCHMARKS)}, the test split of the package's own world, a JSONL or TSV "
        "file of one's own, or a published benchmark, whose file --data names and whose answers VLMEvalKit's own "
        f"classes score: {', '.join(PUBLISHED_BENCHMARKS)}. A row of a JSONL file has an id, a question, an answer, "
        "and optionally image or images, seed, category, options and match.",
    )
    add(
        "--data",
        type=str,
        help="File of a published benchmark, such as MMStar.tsv, as VLMEvalKit has it.",
    )
    add(
        "--prompts",
        choices=list(PROMPTS),
        help=f"Prompts of a published benchmark: those of VLMEvalKit's classes ({PROMPTS[0]}, the default), or those "
        f"of LLaVA-CoT's own evaluation ({PROMPTS[1]}).",
    )
    add(
        "--output",
        type=str,
        required=True,
        help="Folder that takes the answers (answers.jsonl) and the result (result.json). The same command goes on "
        "with it after an interruption, and asks no question twice. With --values, it takes the result and its plot.",
    )
    add(
        "--page",
        type=str,
        help="HTML file that shows the result and, with filters, each question with its image, all candidates, scores "
        "and verdicts of the search, and the right answer. It needs no other file. With --compare, it has the tables "
        "and the plot, and the questions with the answers by the method that is named last.",
    )
    add(
        "--limit",
        type=int | None,
        default=None,
        help="Number of questions to ask, from the first on. By default, all, which are 1,000 with shapes; of these, "
        "any number can be made.",
    )
    add(
        "--match",
        choices=list(MATCHES),
        help="Way to compare conclusions with right answers, where a row names none: the same text but for case, "
        "spacing and punctuation at its ends (exact), the letter or the text of an option (option), yes or no "
        "(yes_no), or a number (number). By default, the form of each right answer decides.",
    )
    add(
        "--tolerance",
        type=float,
        default=0.0,
        help="Largest difference of a right number, as a share of the right answer, with the match number.",
    )
    add("--seed", type=int, default=0, help="Seed of sampled tokens, from which each question has one of its own.")
    add("--slots", type=int, default=8, help="Number of questions that are answered at a time.")
    parser.add_argument_group("Measures of a verifier").add_argument(
        "--values",
        type=str,
        nargs="+",
        help="Folders that llava-cot rollout has written, each with the values and scores of candidates, such as one "
        "before training and one after each round. How well the scores tell the values is measured, and no question "
        "is asked. All are compared with the first.",
    )
    add = parser.add_argument_group("Judge model of a published benchmark").add_argument
    add(
        "--grader.url",
        type=str,
        help="Address of the chat endpoint that VLMEvalKit asks about answers, such as https://api.openai.com/v1. "
        f"The key is read from the environment variable {KEY_VARIABLE}. MM-Vet and MathVista need a judge; without "
        "one, the others are scored by exact matching.",
    )
    add("--grader.model", type=str, help="Name of the model that judges, as the endpoint knows it.")


if __name__ == "__main__":
    cli.run(main, leave=os._exit, command="evaluate")
