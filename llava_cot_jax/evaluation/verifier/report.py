"""Result of measuring verifiers: its file, its plot and its table."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.plotting import check_plots
from llava_cot_jax.evaluation.verifier.measures import CLEAR_DIFFERENCE, differences, measure_verifier
from llava_cot_jax.evaluation.verifier.plot import draw_calibration
from llava_cot_jax.evaluation.verifier.table import print_measures
from llava_cot_jax.evaluation.verifier.values import ScoredValues, read_values
from llava_cot_jax.files import check_file_writable, read_json, write_json
from llava_cot_jax.paths import as_path, writing_errors

_RESULT, _PLOT = "result.json", "calibration"
"""File of the result in the folder of the output, and those of the plot without their endings."""


def report_verifiers(names: Sequence[str], output: str, console: Console) -> None:
    """Measure a verifier on the values in each folder, write the result and its plot, and print a table.

    Args:
        names: Paths of folders that ``rollout`` has written.
        output: Path of the folder that takes the result.
        console: Console to print on.

    Raises:
        UserError: A folder has no values or no scores, the result cannot be written, or it would replace another one.
    """
    check_plots("--values")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"--values names {twice[0]} twice")
    path = as_path(output) / _RESULT
    check_file_writable(path)
    if path.exists() and "verifiers" not in read_json(path):
        raise UserError(f"{path} is the result of an evaluation of answers: name another --output")
    result = _result([read_values(name) for name in names])
    with writing_errors(path):
        write_json(path, result)
    draw_calibration(result["verifiers"], path.with_name(_PLOT))
    print_measures(result, console)


def _result(read: Sequence[ScoredValues]) -> dict[str, Any]:
    """Return the content of the result's file."""
    verifiers = [
        {
            "values": values.name,
            "sha256": values.sha256,
            "questions": values.questions,
            "clusters": values.clusters,
            "unanswered": values.unanswered,
            "unscored": values.unscored,
            "parts": measure_verifier(values),
        }
        for values in read
    ]
    base, *others = read
    less = [{"values": each.name, "less": base.name, "parts": differences(each, base)} for each in others]
    return {"clear_difference": CLEAR_DIFFERENCE, "verifiers": verifiers, "differences": less}
