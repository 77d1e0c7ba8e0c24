"""An HTML page that shows whole searches, in one file that loads nothing else."""

import base64
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llava_cot_jax.files import write_text
from llava_cot_jax.paths import writing_errors
from llava_cot_jax.processing.images import ImageSource
from llava_cot_jax.processing.probe import WHOLE_ANSWER
from llava_cot_jax.search import wording
from llava_cot_jax.search.page_images import PageImages
from llava_cot_jax.search.page_views import percent, search_view
from llava_cot_jax.search.trace import Trace

_LOG = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
"""Folder of the page's templates, style and script."""

DEFAULT_TITLE = "Answers by search"

MAX_UNFOLDED_QUESTIONS = 3
"""Number of questions up to which a page shows everything at once. Longer pages list the questions, with filters, and
show one whole when it is opened."""

MAX_MAIN_FACTS = 8
"""Number of facts that a page shows at once. Further ones are folded."""

LARGE_PAGE = 100_000_000
"""Number of bytes above which a page is reported to be large."""


@dataclass(frozen=True)
class Unanswered:
    """A question without an answer.

    Attributes:
        question: Text of the question.
        error: Reason why there is no answer.
    """

    question: str
    error: str


@dataclass(frozen=True)
class PageEntry:
    """A question on a page.

    Attributes:
        trace: Trace of the search for the answer, or why there is no answer.
        images: Images that the question is about.
        right_answer: Right answer, if it is known.
        correct: Whether the answer is right. By default, whether the conclusion equals ``right_answer`` apart from
            case, spacing, and punctuation at the ends.
        category: Kind of the question; None where there are no kinds.
        name: Name of the question in its file; None for one without.
        scored: Text that was compared with the right answer, where it may differ from the conclusion.
    """

    trace: Trace | Unanswered
    images: Sequence[ImageSource] = ()
    right_answer: str | None = None
    correct: bool | None = None
    category: str | None = None
    name: str | None = None
    scored: str | None = None


@dataclass(frozen=True)
class PageTable:
    """A table on a page.

    Attributes:
        caption: Text above the table.
        columns: Names of the columns.
        rows: Texts of each row, of which the first names the row.
        shares: Share of each row, from 0 to 1, with its standard error, which are drawn; empty for no drawing.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    shares: Sequence[tuple[float, float]] = ()


def write_page(
    path: Path,
    entries: Sequence[PageEntry],
    facts: Mapping[str, object],
    title: str = DEFAULT_TITLE,
    *,
    tables: Sequence[PageTable] = (),
    plot_svg: str | None = None,
) -> None:
    """Write a page of searches to an HTML file, whole or not at all. Missing folders are made.

    Args:
        path: The file.
        entries: Questions in the order of the page.
        facts: Facts for the page's header, by name, such as the model and the date.
        title: Heading of the page.
        tables: Tables above the questions.
        plot_svg: Plot of what the tables say, as an SVG file has it; None for no plot.

    Raises:
        UserError: The file cannot be written.
    """
    page = render_page(entries, facts, title, tables=tables, plot_svg=plot_svg)
    with writing_errors(path):
        write_text(path, page)
    if (size := len(page.encode())) > LARGE_PAGE:
        _LOG.warning(f"{path} has {size / 1e6:.0f} MB, which a browser takes seconds to open: ask fewer questions")


def render_page(
    entries: Sequence[PageEntry],
    facts: Mapping[str, object],
    title: str = DEFAULT_TITLE,
    *,
    tables: Sequence[PageTable] = (),
    plot_svg: str | None = None,
) -> str:
    """Return the HTML of a page. An image that cannot be read is replaced by the reason.

    The arguments are those of ``write_page``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable": wording.printable, "short": wording.short_count, "percent": percent}
    images = PageImages.for_number(sum(len(entry.images) for entry in entries))
    views = [_entry_view(number, entry, images) for number, entry in enumerate(entries, start=1)]
    traces = [entry.trace for entry in entries if isinstance(entry.trace, Trace)]
    script = (FOLDER / "page.js").read_text(encoding="utf-8") if len(views) > MAX_UNFOLDED_QUESTIONS else ""
    named = [(name, str(value)) for name, value in facts.items()]
    return environment.get_template("page.html.jinja").render(
        title=title,
        main_facts=named[:MAX_MAIN_FACTS],
        more_facts=named[MAX_MAIN_FACTS:],
        tables=tables,
        plot=_data_url("image/svg+xml", plot_svg) if plot_svg else "",
        entries=views,
        shared_images=images.shared,
        tally=_tally(entries, views),
        lead=_lead(traces),
        retraces=any(_retraces(trace) for trace in traces),
        filters=_filters(views),
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _data_url(media_type: str, content: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content.encode()).decode()}"


def _lead(traces: Sequence[Trace]) -> str:
    """Return what was searched for and how, for searches by one strategy."""
    start = f"A vision-language model answered {'each question' if len(traces) > 1 else 'a question'}"
    if not traces or traces[0].stages[0].stage == WHOLE_ANSWER:
        return f"{start}. This page shows every answer that it generated, and why the winner won."
    if _retraces(traces[0]):
        return (
            f"{start} in stages and in rounds, of which there was another as long as its reasonings were weak. In each "
            "round it generated captions, and reasonings after the best of these; in the end, a conclusion after each "
            "of the best reasonings of all rounds. This page shows all of them, what each continues, and which won."
        )
    how, each = ("in stages", "stage") if traces[0].whole_text is None else ("sentence by sentence", "sentence")
    return (
        f"{start} {how}. For each {each} it generated candidates, and only the winner was continued in the next one. "
        "This page shows all of them, and why each winner won."
    )


def _retraces(trace: Trace) -> bool:
    """Whether a search had rounds of captions and reasonings, of which several are continued."""
    return any(stage.round for stage in trace.stages)


def _tally(entries: Sequence[PageEntry], views: Sequence[Mapping[str, Any]]) -> str:
    """Return the number of questions of several, and how many answers are right."""
    known = [view["correct"] for view in views if view["correct"] is not None]
    if len(views) < 2:
        return ""
    counted = f"{len(views)} questions"
    if not known:
        return counted
    if all(entry.correct is not None for entry in entries):
        return f"{counted}; {sum(known)} of {len(known)} answers are right"
    return f"{counted}; {sum(known)} of {len(known)} conclusions agree with the right answer"


def _entry_view(number: int, entry: PageEntry, images: PageImages) -> dict[str, Any]:
    """Return the values that the template shows for a question."""
    trace = entry.trace
    is_answered = isinstance(trace, Trace)
    conclusion = wording.conclusion_of(trace) if isinstance(trace, Trace) else ""
    correct, marks = entry.correct, ("right", "wrong")
    if correct is None and entry.right_answer is not None and is_answered:
        correct, marks = wording.agrees(conclusion, entry.right_answer), ("agrees", "does not agree")
    return {
        "number": number,
        "name": entry.name,
        "category": entry.category,
        "question": trace.question.strip(),
        "images": images.embed(entry.images),
        "conclusion": conclusion,
        "scored": entry.scored if entry.scored != conclusion else None,
        "error": "" if isinstance(trace, Trace) else trace.error,
        "right_answer": entry.right_answer,
        "correct": correct,
        "mark": None if correct is None else marks[0 if correct else 1],
        "result": _result(is_answered, correct),
        "search": search_view(trace) if isinstance(trace, Trace) else None,
    }


def _result(is_answered: bool, correct: bool | None) -> str:
    if not is_answered:
        return "unanswered"
    return "unknown" if correct is None else "right" if correct else "wrong"


_RESULTS = {
    "right": "right",
    "wrong": "wrong",
    "unanswered": "without an answer",
    "unknown": "without a known right answer",
}
"""Words for the results that a filter offers."""

_CHANGES = {"changed": "changed the answer", "kept": "kept the answer", "unknown": "took another path"}
"""Words for what a search did to an answer that a filter offers."""


def _filters(views: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, str, int]]]:
    """Return what the filters offer: value, words, and number of questions of each choice that there is."""
    changes = [view["search"]["change"] for view in views if view["search"] and view["search"]["change"]]
    results, categories = [view["result"] for view in views], [view["category"] for view in views]
    named = sorted({name for name in categories if name is not None})
    return {
        "result": [(value, said, results.count(value)) for value, said in _RESULTS.items() if value in results],
        "change": [(value, said, changes.count(value)) for value, said in _CHANGES.items() if changes],
        "category": [(name, name, categories.count(name)) for name in named],
    }
