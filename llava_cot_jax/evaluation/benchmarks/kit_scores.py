"""Scores of predictions by VLMEvalKit's own classes, in a process and a folder of their own."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.benchmarks.grader import Grader
from llava_cot_jax.evaluation.benchmarks.grader_relay import REPLIES, GraderRelay, ReplyFile
from llava_cot_jax.evaluation.benchmarks.kit_process import TOKEN_VARIABLE
from llava_cot_jax.evaluation.benchmarks.published import KIT_VERSION, PublishedBenchmark
from llava_cot_jax.files import write_json
from llava_cot_jax.hosts.surroundings import package_version
from llava_cot_jax.paths import writing_errors

if TYPE_CHECKING:
    from pandas import DataFrame

KIT_FOLDER, SCORED_FOLDER = "vlmevalkit", "scored"
"""Folder of the predictions in that of an evaluation, and in it the one that takes the kit's own files."""

_LOG, _LOCK, _SCORING = "kit.log", ".lock", ".scoring-"

_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONHOME")
"""Environment variables that the kit's process gets. Others change its rules, or are keys."""


def score_predictions(
    benchmark: PublishedBenchmark, table: DataFrame, predictions: Path, grader: Grader | None
) -> dict[str, Any]:
    """Score predictions anew, and keep the kit's own files in the folder ``scored`` beside them.

    The judge's replies are kept in the folder above, so that none is asked for twice.

    Args:
        benchmark: The benchmark.
        table: Rows of its file without their images.
        predictions: File of predictions in the kit's layout.
        grader: Judge of the benchmark; None has the kit match exactly.

    Returns:
        The kit's tables by their names, each a list of rows, and what is to be known of them.

    Raises:
        UserError: The kit cannot score them, the judge does not answer, or another process is scoring them.
    """
    folder = predictions.parent
    with writing_errors(folder), _locked(folder / _LOCK):
        for left in folder.glob(f"{_SCORING}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        (folder / _LOG).unlink(missing_ok=True)  # of a scoring that failed
        place = Path(tempfile.mkdtemp(prefix=_SCORING, dir=folder))
        try:
            shutil.copyfile(predictions, place / predictions.name)
            (place / "LMUData").mkdir()
            # Without pictures, which no score needs, and without their paths, which the kit wants in every row.
            data = table.drop(columns="image_path", errors="ignore")
            data.to_csv(place / "LMUData" / f"{benchmark.dataset}.tsv", sep="\t", index=False, quoting=csv.QUOTE_ALL)
            judged = _judged(benchmark, place, predictions.name, grader, folder.parent / REPLIES)
            tables = {name: _table(place / f"{predictions.stem}{end}") for name, end in benchmark.scorer.tables.items()}
            shutil.rmtree(place / "LMUData")
            shutil.rmtree(folder / SCORED_FOLDER, ignore_errors=True)
            place.chmod(folder.stat().st_mode)  # which a temporary folder keeps from others
            place.rename(folder / SCORED_FOLDER)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    return {
        "scorer": f"VLMEvalKit {KIT_VERSION}",
        "pandas": package_version("pandas"),
        "largest": 1 if benchmark.scorer.is_share else 100,
        "by": "exact matching" if grader is None else grader.describe(),
        **({"judge_requests": judged} if grader else {}),
        "tables": tables,
    }


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from scoring within the block, whose folders each would remove.

    Raises:
        UserError: One is scoring.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent} is being scored by another process: wait for it") from None
        yield


def _judged(
    benchmark: PublishedBenchmark, place: Path, predictions: str, grader: Grader | None, replies: Path
) -> dict[str, int]:
    """Run the kit's process with or without a judge, and return what there is to say of the judge's replies."""
    if grader is None:
        with _kit_process(benchmark, place, predictions) as process:
            process.wait()
        return _unread(place, process.returncode)
    kept = ReplyFile(replies)
    with contextlib.closing(kept):
        running: list[subprocess.Popen[bytes]] = []

        def stop() -> None:
            for process in running:
                process.kill()

        with GraderRelay(grader, kept, on_failure=stop) as relay:
            with _kit_process(benchmark, place, predictions, relay, grader) as process:
                running.append(process)
                process.wait()
            if relay.failure:
                raise relay.failure
            counts = _unread(place, process.returncode)
            if (sent := counts.pop("sent")) != relay.requests:
                raise UserError(
                    f"VLMEvalKit made {sent} requests to the judge, of which {relay.requests} reached it: there is no "
                    "score without the others"
                )
            return relay.counts() | counts


@contextmanager
def _kit_process(
    benchmark: PublishedBenchmark,
    place: Path,
    predictions: str,
    relay: GraderRelay | None = None,
    grader: Grader | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process that scores predictions, which does not outlive the block."""
    job = {
        "module": benchmark.scorer.module,
        "scorer": benchmark.scorer.name,
        "dataset": benchmark.dataset,
        "predictions": predictions,
        "relay": relay and relay.address,
    }
    write_json(place / "job.json", job)
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONHASHSEED": "0",  # by which the kit orders the rows of a table
        "LMUData": str(place / "LMUData"),
        "no_proxy": "*",
        "NETRC": os.devnull,  # a password in ~/.netrc would take the place of the relay's
    }
    if relay and grader:
        environment |= {TOKEN_VARIABLE: relay.token, "LOCAL_LLM": grader.model}
    script = Path(__file__).with_name("kit_process.py")
    with (place / _LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            cwd=place,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _unread(place: Path, code: int) -> dict[str, int]:
    """Return the counts that the kit's process left.

    Raises:
        UserError: It did not end well.
    """
    if code:
        log = shutil.copyfile(place / _LOG, place.parent / _LOG)
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
        reason = " ".join(lines[-1].split())
        raise UserError(f"VLMEvalKit {KIT_VERSION} cannot score the predictions: {reason} ({log} says more)")
    counts: dict[str, int] = json.loads((place / "unread.json").read_text())
    return counts


def _table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table of the kit."""
    if not path.exists():
        raise UserError(f"VLMEvalKit {KIT_VERSION} left no table of scores, {path.name}")
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def _value(cell: str) -> str | int | float | None:
    """Return a cell as a number where it is one, and as None where it is empty."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if math.isfinite(number := kind(cell)):
                return number
    return cell or None
