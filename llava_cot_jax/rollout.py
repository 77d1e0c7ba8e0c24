"""Give a search's candidates values: how often answers that go on from each are right.

llava-cot rollout --data shapes --limit 1000 --output runs/values
llava-cot rollout --data data/llava_cot_100k --checkpoint DIR_OR_HUB_ID --output runs/values_11b
llava-cot rollout --data FILE.jsonl --checkpoint DIR_OR_HUB_ID --output runs/mine
llava-cot rollout --data shapes --limit 1000 --output runs/answers --search best_of_n --judge verifier
llava-cot rollout --data shapes --limit 10000 --checkpoint Llama-3.2-11B-Vision-Instruct --estimate
llava-cot rollout --values runs/values --pairs runs/values/pairs.jsonl --form trl
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, cast

from llava_cot_jax import cli
from llava_cot_jax.answering_model import AnsweringModel, add_model_options, check_mesh_sizes
from llava_cot_jax.answering_processes import add_process_options, complete_job, run_in_group
from llava_cot_jax.checks import check_int, shown
from llava_cot_jax.costs.chips import CHIPS, Chip
from llava_cot_jax.data.description import DESCRIPTION
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.matching import MATCHES, MatchFunction
from llava_cot_jax.evaluation.question_sets import EvaluationSet, Matching
from llava_cot_jax.hosts.lifeline import Lifeline
from llava_cot_jax.hosts.process_group import ProcessGroup
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.paths import BUNDLED_MODEL, as_path, reading_errors
from llava_cot_jax.search.options import add_arguments, strategy_or_sampling
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.request_options import add_weight_options
from llava_cot_jax.search.strategies import SearchSpec, Strategy, check_continuable
from llava_cot_jax.values.job import VALUES, RolloutJob
from llava_cot_jax.values.pairs import MIN_DIFFERENCE, PAIR_FORMS, PAIRS_OF, write_pairs
from llava_cot_jax.values.questions import ROW_SPLITS, open_questions

_CHIPS = {chip.name.removeprefix("TPU ").replace(" GB", "GB").replace(" ", "_"): chip for chip in CHIPS}
"""Chips by the names that ``--chip`` takes."""

DEFAULT_CONTINUATIONS = 8
"""Number of continuations of a candidate where none is given."""

_PAIRS = ("values", "pairs", "form", "min_difference", "of")
"""Options of writing pairs, of which the first three go together."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An argument, a file or a checkpoint that cannot be used, before anything expensive starts.
    """
    parser = _parser()
    run_in_group("rollout", parser, sys.argv[1:] if argv is None else argv, partial(_rollout, parser))


def _rollout(parser: cli.Parser, options: Any, group: ProcessGroup, lifeline: Lifeline | None) -> None:
    """Give values to the candidates of the questions that have none yet, or do what else the options ask for.

    Args:
        parser: Parser of the options.
        options: Options of the command.
        group: Processes of the run.
        lifeline: Bond of the processes that have one model over all their devices; None where each has its own.
    """
    if any(options[name] is not None for name in _PAIRS):
        _write_pairs(parser, options, group)
        return
    strategy = _checked_strategy(options)
    if options.data is None:
        raise UserError("there are no questions: give --data, or --values and --pairs to write pairs of values")
    matching = Matching(_match(options.match), options.tolerance)
    questions = open_questions(options.data, options.split, options.first, options.limit, matching, options.seed)
    if options.estimate:
        from llava_cot_jax.planning.model_sizes import model_config_for

        config = model_config_for(options.checkpoint or BUNDLED_MODEL)
        if group.index == 0:
            print(_estimate(options, config, strategy.to_spec(), len(questions.rows)))
        return
    _run_job(options, strategy, questions, group, lifeline)


def _run_job(
    options: Any, strategy: Strategy, questions: EvaluationSet, group: ProcessGroup, lifeline: Lifeline | None
) -> None:
    """Give values to the candidates of the questions that have none yet."""
    if options.output is None:
        raise UserError("--output is missing: name the folder that takes the values")
    folder = as_path(options.output)
    with reading_errors(folder):
        if (folder / DESCRIPTION).exists():
            raise UserError(f"{folder} has prepared data, which values would hide: name another output")
    model = AnsweringModel.find(options)
    job = RolloutJob(options, questions, folder, strategy, model, writes=group.index == 0)
    if job.unanswered:
        print(_estimate(options, model.config, strategy.to_spec(), len(job.unanswered)), file=sys.stderr)

    def fields() -> dict[str, str]:
        own = ("hosts", "checkpoint", "adapter", "verifier_adapter", "config", "data", "output")
        return {name: str(value) for name, value in vars(options).items() if name not in own} | job.fields()

    complete_job(job, model, group, lifeline, fields)
    if group.index == 0:
        print(f"wrote the values to {folder / VALUES}", file=sys.stderr)
        job.check_answered()


def _checked_strategy(options: Any) -> Strategy:
    """Return the search, once all options have been checked that need no file of questions.

    Raises:
        UserError: One of them cannot be used.
    """
    options.search = options.search or "stage_beam"
    strategy = strategy_or_sampling(options)
    assert not isinstance(strategy, Sampling)  # there is a search
    spec = strategy.to_spec()
    check_int("slots", options.slots)
    if spec.has_verifier and spec.can_stream and not spec.stages:  # whole answers, which are not continued
        if options.continuations is not None:
            raise UserError(f"--continuations has no meaning for --search {options.search}, whose candidates are whole")
    else:
        check_continuable(spec)
        options.continuations = DEFAULT_CONTINUATIONS if options.continuations is None else options.continuations
        check_int("continuations", options.continuations)
    check_mesh_sizes(options)
    JudgePrompts.load(options.judge_prompts)
    _stage_tokens(options, spec)
    return strategy


def _match(name: str | None) -> str | MatchFunction | None:
    """Return the way to compare that ``--match`` names.

    Raises:
        UserError: There is no such way, and no such function.
    """
    if name is None or name in MATCHES:
        return name
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function, None) if module and function else None
    except ImportError as fault:
        raise UserError(
            f"--match {name}: its module cannot be imported ({fault}): put its folder on PYTHONPATH"
        ) from None
    except Exception as fault:  # what a module does when it is imported
        raise UserError(
            f"--match {name}: its module cannot be imported ({type(fault).__name__}: {' '.join(str(fault).split())})"
        ) from fault
    if not callable(found):
        raise UserError(f"--match is {shown(name)}; it must be {', '.join(MATCHES)}, or MODULE:FUNCTION of a function")
    return cast(MatchFunction, found)


def _stage_tokens(options: Any, spec: SearchSpec) -> tuple[int, ...]:
    """Return the number of tokens of a candidate of each stage that the estimate assumes."""
    from llava_cot_jax.benchmark.workload import Workload

    given = options.stage_tokens or Workload().stage_tokens
    if len(given) != spec.num_stages:
        if options.stage_tokens is None:
            given = (sum(given) // spec.num_stages,) * spec.num_stages
        else:
            raise UserError(f"stage_tokens has {len(given)} values for {spec.num_stages} stages: give one for each")
    for tokens in given:
        check_int("stage_tokens", tokens)
    return tuple(min(pair) for pair in zip(given, spec.max_new_tokens, strict=True))


def _estimate(options: Any, config: MllamaConfig, spec: SearchSpec, questions: int) -> str:
    """Return what the job takes at least."""
    from llava_cot_jax.planning.rollout_plan import estimate_rollouts
    from llava_cot_jax.planning.search_plan import BFLOAT16_BYTES, TYPICAL_WORKLOAD

    chip: Chip = _CHIPS[options.chip]
    work = replace(TYPICAL_WORKLOAD, stage_tokens=_stage_tokens(options, spec))
    found = estimate_rollouts(
        config,
        spec,
        options.continuations or 0,
        chip,
        questions=questions,
        slots=options.slots,
        work=work,
        weight_bytes=1 if options.quantize else BFLOAT16_BYTES,
    )
    return str(found)


def _write_pairs(parser: cli.Parser, options: Any, group: ProcessGroup) -> None:
    """Write pairs for preference training from values.

    Raises:
        UserError: An option is missing, cannot be used or has no meaning, or a file cannot be read or written.
    """
    for name in _PAIRS[:3]:
        if options[name] is None:
            raise UserError(
                f"--{name} is missing: pairs are written by --values FOLDER --pairs FILE --form {'|'.join(PAIR_FORMS)}"
            )
    for name in parser.given(options):
        if name not in (*_PAIRS, "config"):
            raise UserError(f"--{name} has no meaning with --values, from which pairs are written")
    if group.index == 0:
        least = MIN_DIFFERENCE if options.min_difference is None else options.min_difference
        folder, path = as_path(options["values"]), as_path(options.pairs)
        count = write_pairs(folder, path, options.form, least, options.of or PAIRS_OF[0])
        print(f"wrote {count:,} pairs to {options.pairs}", file=sys.stderr)


def _parser() -> cli.Parser:
    parser = cli.Parser("rollout")
    _add_rollout_options(parser)
    _add_pair_options(parser)
    add_model_options(parser)
    add_arguments(parser)
    add_weight_options(parser)
    add_process_options(parser)
    return parser


def _add_rollout_options(parser: cli.Parser) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=str,
        help="Questions whose right answers are known: shapes, the package's own world; a folder that prepare has "
        "made, of which the conclusion of the first answer of a row is the right one; or a JSONL or TSV file as "
        "evaluate --benchmark takes it.",
    )
    add("--split", choices=list(ROW_SPLITS), help="Split of shapes, or of a prepared folder. By default, train.")
    add("--first", type=int, default=0, help="Index of the first row, so that later rounds take other ones.")
    add("--limit", type=int | None, default=None, help="Number of rows from --first on. By default, all.")
    add(
        "--output",
        type=str,
        help=f"Folder that takes the values ({VALUES}) and the images of the questions. The same command goes on with "
        "it after an interruption, and does nothing twice.",
    )
    add(
        "--continuations",
        type=int | None,
        default=None,
        help="Number of continuations of each candidate to the end of the answer. Its value is the share of them that "
        "are right; that of a candidate of the last stage, which has none, is whether it is right itself. By default, "
        f"{DEFAULT_CONTINUATIONS}.",
    )
    add(
        "--match",
        type=str | None,
        default=None,
        help=f"Way to compare conclusions with right answers, where a row names none: {', '.join(MATCHES)}, as in "
        "evaluate, or MODULE:FUNCTION, a function of your own in a module that Python finds. It is called with a "
        "conclusion and the RightAnswer, and says whether the conclusion is right. Of prepared data it is also the way "
        "to read the right answer: the letter, yes or no, the number, or else the text of the row's conclusion.",
    )
    add(
        "--tolerance",
        type=float,
        default=0.0,
        help="Largest difference of a right number, as a share of the right answer, with the match number.",
    )
    add("--seed", type=int, default=0, help="Seed of sampled tokens, from which each question has one of its own.")
    add("--slots", type=int, default=8, help="Number of questions that are searched at a time.")
    add(
        "--estimate",
        type=bool,
        default=False,
        help="Only print the tokens, the FLOPs and the least hours of a chip, without loading weights. --checkpoint "
        "may be the name of a published model.",
    )
    add("--chip", choices=list(_CHIPS), default="v6e", help="Chip that the hours are of.")
    add(
        "--stage_tokens",
        type=tuple[int, ...] | None,
        default=None,
        help="Number of tokens of a candidate of each stage that the estimate assumes. By default, 60, 100, 200 and "
        "30, or what --max_new_tokens leaves.",
    )


def _add_pair_options(parser: cli.Parser) -> None:
    add = parser.add_argument_group("Pairs for preference training").add_argument
    add("--values", type=str, help="Folder of values that this command has written, to make pairs of.")
    add("--pairs", type=str, help="JSONL file that takes the pairs. Its paths of images are relative to its folder.")
    add(
        "--form",
        choices=list(PAIR_FORMS),
        help="Form of the pairs: llama_factory is that of LLaMA-Factory's preference data in ShareGPT's form, trl that "
        "of TRL's conversational preference data.",
    )
    add(
        "--min_difference",
        type=float | None,
        default=None,
        help=f"Least difference of the values of two candidates that makes a pair. By default, {MIN_DIFFERENCE}.",
    )
    add(
        "--of",
        choices=list(PAIRS_OF),
        help="What a pair is made of: two candidates of a stage, with the answer before them (stages, the default), or "
        "a right and a wrong whole answer (answers).",
    )


if __name__ == "__main__":
    cli.run(main, leave=os._exit, command="rollout")
