"""Predictions in VLMEvalKit's own layout: an xlsx file with a benchmark's columns and the answers."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cot_jax.evaluation.matching import scored_text
from llava_cot_jax.files import write_bytes
from llava_cot_jax.paths import writing_errors
from llava_cot_jax.stage_format import StageFormat

if TYPE_CHECKING:
    from pandas import DataFrame

MODEL_NAME = "llava_cot_jax"
"""Name of the model, with which VLMEvalKit's files of predictions begin."""

NO_ANSWER = "Z"
"""Prediction of a question without an answer. VLMEvalKit takes it for a refusal, which is right nowhere."""

LONGEST_CELL = 32_767
"""Length, in characters, of the longest text in a cell of an xlsx file."""

READ_AS_MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
}
"""Texts that pandas reads as missing cells."""

_WRITTEN_ANEW = ("=", "{=", "mailto:", "internal:", "external:")
"""Beginnings of texts that VLMEvalKit would change as it writes them again: formulas, and addresses without these."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff]")
"""Characters that no cell of an xlsx file can have."""


def write_predictions(path: Path, table: DataFrame, rows: Sequence[Mapping[str, Any]], format: StageFormat) -> None:
    """Write answers as VLMEvalKit writes them: the table's columns, and those of the answers.

    The column ``prediction`` has what is scored, which is the conclusion alone, and ``full_prediction`` the whole text.

    Args:
        path: Path of the file, which ends in .xlsx.
        table: Rows of the benchmark's file without their images.
        rows: Rows of the answers, whose ids are indices of the table.
        format: Format of the stages.

    Raises:
        UserError: The file cannot be written.
    """
    import pandas

    places = {str(index): place for place, index in enumerate(table["index"])}
    answered = table.iloc[[places[str(row["id"])] for row in rows]].copy()
    answered["prediction"] = [prediction_of(row, format) for row in rows]
    answered["full_prediction"] = [as_cell(row.get("text", "")) or None for row in rows]
    file = io.BytesIO()
    # What begins like a formula or an address is a text all the same.
    plain = {"options": {"strings_to_formulas": False, "strings_to_urls": False}}
    with pandas.ExcelWriter(file, engine="xlsxwriter", engine_kwargs=plain) as writer:
        answered.to_excel(writer, index=False)
    with writing_errors(path):
        write_bytes(path, file.getvalue())


def prediction_of(row: Mapping[str, Any], format: StageFormat) -> str:
    """Return what VLMEvalKit scores of the row of an answer: its conclusion, or ``NO_ANSWER`` where it says nothing."""
    if "error" in row:
        return NO_ANSWER
    text = scored_text(row["text"], format, row["stages"].get(format.conclusion))
    return as_cell(text) if _CONTROL.sub(" ", text).strip() else NO_ANSWER


def as_cell(text: str) -> str:
    """Return a text that VLMEvalKit reads from a cell of an xlsx file as it stands here.

    Control characters become spaces. A space after a text that would be read as missing, and one before a text that the
    kit would write again as a formula or an address, keep it as it is; neither counts where answers are compared.
    """
    text = _CONTROL.sub(" ", text)
    if text.startswith(_WRITTEN_ANEW):
        text = f" {text}"
    if text in READ_AS_MISSING and text:
        text = f"{text} "
    return text[:LONGEST_CELL]
