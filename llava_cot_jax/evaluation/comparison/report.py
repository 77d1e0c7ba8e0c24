"""Files and tables of a comparison: of several methods, or of an evaluation and another one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_cot_jax.evaluation.comparison.against import MatchedAnswers
from llava_cot_jax.evaluation.comparison.job import ComparisonJob
from llava_cot_jax.evaluation.comparison.lines import Line, MethodResult, comparison_lines
from llava_cot_jax.evaluation.comparison.plot import draw_comparison
from llava_cot_jax.evaluation.comparison.tables import print_comparison
from llava_cot_jax.files import write_text
from llava_cot_jax.paths import writing_errors

COMPARISON = "comparison.jsonl"
"""File of a comparison in the folder of an evaluation."""


def report_comparison(job: ComparisonJob, folder: Path, console: Console, page: Path | None) -> None:
    """Write and print what a finished comparison of methods says.

    Args:
        job: The comparison.
        folder: Folder that takes the files.
        console: Console to print on.
        page: HTML file to write too; None for no page.

    Raises:
        UserError: A file cannot be written.
    """
    answers = job.answers()
    results = []
    for each in answers:
        told = {
            "num_candidates": each.method.num_candidates,
            "search": repr(each.method.strategy),
            "run": each.run.folder,
            "derived": each.is_derived,
            "seconds_per_question": each.seconds_per_question,
        }
        results.append(MethodResult(each.method.name, each.method.family, each.rows, told))
    environments = list({json.dumps(found): found for each in answers for found in each.environments}.values())
    lines = [{"kind": "about", **job.about(), "environments": environments}, *comparison_lines(results)]
    _report(lines, folder, console)
    drawn = draw_comparison(lines, (folder / COMPARISON).with_suffix(""))
    if page is not None:
        from llava_cot_jax.evaluation.comparison.page import write_comparison_page

        write_comparison_page(page, job, lines, drawn["svg"].read_text(encoding="utf-8"))


def report_against(about: Mapping[str, Any], name: str, other: MatchedAnswers, folder: Path, console: Console) -> None:
    """Write and print the difference between an evaluation and another one, on the questions of both.

    Args:
        about: What the evaluation's own result says.
        name: Name of the evaluation.
        other: Answers to the questions of both.
        folder: Folder that takes the file.
        console: Console to print on.

    Raises:
        UserError: The file cannot be written.
    """
    results = [
        MethodResult(name, name, other.own, {"settings": about["run"]}),
        MethodResult(other.name, other.name, other.others, {"settings": other.settings}),
    ]
    told = {key: about[key] for key in ("benchmark", "sha256", "run", "environments")}
    counts = {"left_out": other.left_out, "other_seeds": other.other_seeds}
    first = {"kind": "about", "questions": len(other.own), **told, **counts}
    _report([first, *comparison_lines(results)], folder, console)
    if other.left_out:
        console.print(f"{other.left_out} questions of this evaluation have no answer in {other.name}.", soft_wrap=True)
    if other.other_seeds:
        counted = f"{other.other_seeds} of {len(other.own)} questions"
        console.print(f"{counted} have another seed in {other.name}, so that draws differ.", soft_wrap=True)


def _report(lines: Sequence[Line], folder: Path, console: Console) -> None:
    path = folder / COMPARISON
    with writing_errors(path):
        write_text(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))
    print_comparison(lines, console)
