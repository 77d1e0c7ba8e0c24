"""HTML page of a comparison: its tables, its plot, and each question with the search of one of the methods."""

from collections.abc import Sequence
from pathlib import Path

from llava_cot_jax.evaluation.comparison.job import ComparisonJob
from llava_cot_jax.evaluation.comparison.lines import Line, lines_of
from llava_cot_jax.evaluation.comparison.tables import ComparisonTable, comparison_tables, standard_error_of
from llava_cot_jax.evaluation.page import facts_of, page_entry
from llava_cot_jax.search.page import PageTable, write_page


def write_comparison_page(path: Path, job: ComparisonJob, lines: Sequence[Line], plot_svg: str) -> None:
    """Write the page of a comparison. Its questions have the answers by the method that was named last.

    Args:
        path: The HTML file.
        job: The comparison, finished.
        lines: Lines of the comparison's file.
        plot_svg: Plot of the comparison, as an SVG file has it.

    Raises:
        UserError: The file cannot be written, or a row has no trace.
    """
    shown, questions = job.methods[-1], job.questions
    (about,), methods = lines_of(lines, "about"), list(lines_of(lines, "method"))
    result = {
        **about,
        **{name: methods[-1][name] for name in ("tokens_per_question", "flops_per_question")},
        "accuracy": {"all": methods[-1]},
        "run": {"search": methods[-1]["search"]} | about["run"],
    }
    facts = {"the questions below have the answers by": shown.name} | dict(facts_of(result))
    format = shown.strategy.to_spec().format
    scored = zip(questions.rows, job.scored_rows(shown), strict=True)
    entries = [page_entry(row, question.sources, format) for question, row in scored]
    by_method, *others = comparison_tables(lines)
    shares = [(line["accuracy"], standard_error_of(line) or 0.0) for line in methods]
    tables = [_page_table(by_method, shares), *map(_page_table, others)]
    write_page(path, entries, facts, f"Searches compared on {about['benchmark']}", tables=tables, plot_svg=plot_svg)


def _page_table(table: ComparisonTable, shares: Sequence[tuple[float, float]] = ()) -> PageTable:
    caption = " ".join([f"{table.title}.", *table.notes]) if table.notes else table.title
    return PageTable(caption, table.columns, table.rows, shares)
