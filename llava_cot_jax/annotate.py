"""Make training data: staged answers to questions whose standard answers are known.

llava-cot annotate --input questions.jsonl --images DIR_OR_ZIP --output annotated.jsonl --model NAME --base_url URL
llava-cot annotate --input questions.jsonl --images DIR_OR_ZIP --output annotated.jsonl --model self
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cot_jax import cli
from llava_cot_jax.annotation.asking import RowAsker
from llava_cot_jax.annotation.budget import Budget, Estimate, estimated_input
from llava_cot_jax.annotation.dialogue import ReplySettings, ask_about_row
from llava_cot_jax.annotation.endpoint import EndpointClient, check_openai, endpoint_url, read_key
from llava_cot_jax.annotation.job import AnnotationJob, AnnotationTotals, files_beside
from llava_cot_jax.annotation.journal import USAGE
from llava_cot_jax.annotation.options import SELF, annotation_parser, check_annotation_options, read_prices
from llava_cot_jax.annotation.outcomes import RowOutcome
from llava_cot_jax.annotation.pace import Pace
from llava_cot_jax.annotation.prompts import AnnotationPrompts
from llava_cot_jax.annotation.rows import RowToAnnotate, read_rows_to_annotate
from llava_cot_jax.annotation.sampling import sample_for_row
from llava_cot_jax.answering_model import AnsweringModel, check_mesh_sizes
from llava_cot_jax.data.raw.inputs import images_path, local_path
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import short_digest
from llava_cot_jax.paths import as_path, reading_errors
from llava_cot_jax.search.prompts import JudgePrompts

if TYPE_CHECKING:
    from llava_cot_jax.data.raw.images import RawImages

_LINES = 20
"""Number of lines that tell how far the work is where there is no terminal."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An argument, a file, a checkpoint or an endpoint that cannot be used.
    """
    options = annotation_parser().parse_args(sys.argv[1:] if argv is None else argv)
    if options.model != SELF:
        check_openai()
    check_annotation_options(options)
    if options.model == SELF:
        _sample(options)
    else:
        _ask(options)


@dataclass
class _Shown:
    """Progress of the rows on the screen."""

    job: AnnotationJob
    totals: AnnotationTotals
    done: int
    budget: Budget | None = None

    def __post_init__(self) -> None:
        self._before, self._began, self._update = self.done, time.perf_counter(), lambda done, total, note="": None

    def open(self) -> Any:
        """Open the progress bar."""
        return cli.progress_bar("annotating", unit="rows", every=max(1, len(self.job.rows) // _LINES))

    def start(self, update: Any) -> None:
        """Count the time from now on."""
        self._update, self._began = update, time.perf_counter()

    def add(self, row: RowToAnnotate, outcome: RowOutcome) -> None:
        """Show that a row is finished."""
        self.totals.add(row, outcome)
        self.done += 1
        rate = (self.done - self._before) / max(time.perf_counter() - self._began, 1e-9)
        cost = self.budget.cost if self.budget else None
        spent = "" if cost is None else f", cost {cost:,.4g}"
        note = f"{rate:,.2f} rows/s, {self.totals.rejected_share:.1%} of the turns rejected{spent}"
        self._update(self.done, len(self.job.rows), note)


def _ask(options: Any) -> None:
    """Let an endpoint answer."""
    prices, pace = read_prices(options), Pace(options.requests_per_minute)
    url = endpoint_url(options.base_url)
    key = read_key(options.key_variable, url)
    prompts = AnnotationPrompts.load(options.prompts)
    rows, images = _read_input(options)
    settings = ReplySettings(options.model, options.max_new_tokens or 2048, options.temperature, options.max_side)
    job = AnnotationJob(rows, _output(options), lambda row: ask_about_row(row, prompts, settings, options.tries))
    with closing(job):
        budget = Budget(job.journal, options.max_requests, options.max_cost, prices)
        shown, waiting, tokens = _begin(job, estimated_input)
        shown.budget = budget
        if waiting:
            print(Estimate.of(waiting, tokens, options.tries).described(prices, options.model), flush=True)
        bounds = (options.timeout, options.max_retries, options.length_parameter)
        client = EndpointClient(url, key, images, job.journal, budget, pace, *bounds)
        asker = RowAsker(job, client, pace, shown.add)
        with shown.open() as update, _telling_how_to_go_on(job):
            shown.start(update)
            asyncio.run(asker.ask_about(iter(waiting), min(options.requests_in_flight, len(waiting) or 1)))
            if asker.interrupted:
                raise KeyboardInterrupt
        spent = "" if budget.cost is None else f", cost {budget.cost:,.4g}"
        read, written = (job.journal.tokens[name] for name in USAGE)
        print(f"replies: {len(job.journal):,}; tokens in: {read:,}; out: {written:,}{spent}")
        if client.troubles:
            print(f"requests that failed: {_counted(client.troubles)}")
        failed = [f"{count} by {what}" for what, count in asker.failures.items()]
        _report(job, "" if asker.fault else asker.stopped or "; ".join(failed))
        if asker.fault:
            raise asker.fault


def _sample(options: Any) -> None:
    """Let this project's own model answer."""
    check_mesh_sizes(options)
    JudgePrompts.load(options.judge_prompts)
    rows, images = _read_input(options)
    model = AnsweringModel.find(options)
    output = _output(options)
    settings = _settings_of(options, model)
    job = AnnotationJob(rows, output, lambda row: sample_for_row(row, settings, options.tries))
    with closing(job):
        shown, waiting, _ = _begin(job)
        if waiting:
            turns = sum(len(row.turns) for row in waiting)
            print(
                f"{turns:,} turns, for each of which {options.num_candidates} candidates are sampled at most "
                f"{options.tries} times",
                flush=True,
            )
            with _telling_how_to_go_on(job):
                try:
                    _run_sampler(options, model, job, images, shown)
                except Exception:
                    _report(job, "an error ended the run")
                    raise
        _report(job, "")


def _run_sampler(options: Any, found: AnsweringModel, job: AnnotationJob, images: RawImages, shown: _Shown) -> None:
    # These imports take longer than all checks so far.
    from llava_cot_jax.annotation.sampler import RowSampler
    from llava_cot_jax.processing.processor import Processor
    from llava_cot_jax.search.request_builder import RequestBuilder
    from llava_cot_jax.search.scorers import Verifier
    from llava_cot_jax.search.strategies import BestOfN

    cli.enable_compilation_cache()
    given = {} if options.temperature is None else {"temperature": options.temperature}
    strategy = BestOfN(options.num_candidates, Verifier(), max_new_tokens=options.max_new_tokens, **given)
    processor = Processor.from_pretrained(found.folder, found.config)
    builder = RequestBuilder(processor, strategy, options.judge_prompts, found.stated_length)
    model = found.load(found.mesh(), is_first=True)
    sampler = RowSampler(builder, images, options.slots)
    with shown.open() as update:
        shown.start(update)
        cli.run_interruptible(lambda: sampler.run(model, job, shown.add))


def _settings_of(options: Any, model: AnsweringModel) -> dict[str, Any]:
    """Return what the candidates depend on, besides the conversations."""
    path = as_path(options.judge_prompts)
    with reading_errors(path):
        prompts = short_digest(path.read_bytes())
    names = ("dtype", "quantize", "num_candidates", "temperature", "max_new_tokens", "seed")
    return {
        **{name: options[name] for name in names},
        "convention": model.config.convention,
        "default_max_new_tokens": model.stated_length,
        "judge_prompts": prompts,
        **model.digests,
    }


def _read_input(options: Any) -> tuple[list[RowToAnnotate], RawImages]:
    """Read the rows, and open their images."""
    from llava_cot_jax.data.raw.images import open_images

    path, root = local_path(options.input), images_path(options.images)
    with reading_errors(path):
        content = path.read_bytes()
    images = open_images(root)
    return read_rows_to_annotate(path, content, images, root), images


def _output(options: Any) -> Path:
    """Return the file of the annotated rows.

    Raises:
        UserError: It, or a file beside it, is that of the questions; or it has another ending.
    """
    output = as_path(options.output)
    if output.suffix != ".jsonl":
        raise UserError(f"--output is {options.output}; its name must end in .jsonl")
    for path in (output, *files_beside(output)):
        if path.exists() and path.samefile(local_path(options.input)):
            raise UserError(f"--output {output} would overwrite the file of the questions, {path}: name another")
    return output


def _begin(
    job: AnnotationJob, tokens_of: Callable[[Any], int] = lambda request: 0
) -> tuple[_Shown, list[RowToAnnotate], int]:
    """Return the progress so far, the rows that are not finished, and about how many tokens their requests have."""
    totals, waiting, refused, tokens = AnnotationTotals(), list[RowToAnnotate](), list[RowToAnnotate](), 0
    for row, outcome in job.outcomes():
        if isinstance(outcome, RowOutcome):
            totals.add(row, outcome)
        else:
            (refused if job.journal.was_refused(outcome) else waiting).append(row)
            tokens += tokens_of(outcome) * len(row.turns)
    waiting += refused  # which an earlier run was told that the endpoint does not take
    return _Shown(job, totals, len(job.rows) - len(waiting)), waiting, tokens


@contextmanager
def _telling_how_to_go_on(job: AnnotationJob) -> Iterator[None]:
    """Say at Ctrl-C where the replies are."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"all replies so far are in {job.journal.path}: the same command goes on", file=sys.stderr, flush=True)
        raise


def _counted(counts: Any) -> str:
    """Return counts as a list in a sentence, the largest first."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _report(job: AnnotationJob, why_unfinished: str) -> None:
    """Write the files, and print what is in them."""
    totals = job.finish()
    rejected = totals.rejected.total()
    print(f"turns kept: {totals.kept:,}, in {totals.rows:,} rows; rejected: {rejected:,} ({totals.rejected_share:.1%})")
    if rejected:
        print(f"reasons of rejected turns: {_counted(totals.rejected)}")
    if totals.failed_tries:
        print(f"reasons of all tries that were not kept: {_counted(totals.failed_tries)}")
    print(f"wrote {job.output}, and the rejected turns to {job.rejected}; all replies are in {job.journal.path}")
    if totals.unfinished:
        why = f" ({why_unfinished})" if why_unfinished else ""
        print(
            f"warning: {totals.unfinished:,} of {len(job.rows):,} rows are not finished{why}, and not in the output: "
            "the same command goes on with them",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.run(main, leave=os._exit, command="annotate")
