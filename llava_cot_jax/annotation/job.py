"""Job of annotating rows: what the journal says of each row, and the files that are made of it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_cot_jax.annotation.journal import Journal
from llava_cot_jax.annotation.outcomes import RowOutcome, RowSteps
from llava_cot_jax.annotation.rows import RowToAnnotate
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import atomic_file
from llava_cot_jax.paths import writing_errors


@dataclass
class AnnotationTotals:
    """Counts of what became of the rows.

    Attributes:
        rows: Number of rows with an answer.
        kept: Number of turns with an answer.
        unfinished: Number of rows that are still to be asked about, or asked further.
        rejected: Number of rejected turns, by the reason of the last try.
        failed_tries: Number of tries that were not kept, by the reason, also of turns of which a later try was.
    """

    rows: int = 0
    kept: int = 0
    unfinished: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failed_tries: Counter[str] = field(default_factory=Counter)

    def add(self, row: RowToAnnotate, outcome: RowOutcome) -> None:
        """Count the outcome of a row."""
        self.rows += bool(outcome.kept)
        self.kept += len(outcome.kept)
        self.rejected.update(each["reason"] for each in outcome.rejected(row))
        self.failed_tries.update(each.fault.kind.value for each in outcome.failed)

    @property
    def rejected_share(self) -> float:
        """Share of the turns of finished rows that are rejected."""
        rejected = self.rejected.total()
        return rejected / max(rejected + self.kept, 1)


class AnnotationJob:
    """Job of annotating rows into a file.

    Args:
        rows: The rows.
        output: File that takes the annotated rows. The journal and the rejected turns stand beside it.
        steps: Function that yields the requests about a row.

    Attributes:
        rows: The rows.
        output: File of the annotated rows.
        rejected: File of the rejected turns.
        journal: Replies so far.

    Raises:
        UserError: The output cannot be written, or is no output of this command.
    """

    def __init__(self, rows: Sequence[RowToAnnotate], output: Path, steps: Callable[[RowToAnnotate], RowSteps]) -> None:
        self.rows, self.output, self.steps = rows, output, steps
        self.rejected, journal = files_beside(output)
        for path in (output, self.rejected):
            if path.exists() and not journal.exists():
                raise UserError(
                    f"{path} exists, but {journal.name}, which has its replies, does not: name another output"
                )
        self.journal = Journal(journal)

    def replay(self, row: RowToAnnotate) -> RowOutcome | Any:
        """Return the outcome of a row, or the first request about it whose reply the journal does not have."""
        steps = self.steps(row)
        try:
            request = next(steps)
            while (reply := self.journal.get(request)) is not None:
                request = steps.send(reply)
        except StopIteration as end:
            outcome: RowOutcome = end.value
            return outcome
        return request

    def outcomes(self) -> Iterator[tuple[RowToAnnotate, RowOutcome | Any]]:
        """Yield each row with what ``replay`` returns."""
        for row in self.rows:
            yield row, self.replay(row)

    def finish(self) -> AnnotationTotals:
        """Write the annotated rows and the rejected turns, in the order of the rows. Both files appear whole.

        Raises:
            UserError: They cannot be written.
        """
        totals = AnnotationTotals()
        with (
            writing_errors(self.output),
            atomic_file(self.rejected) as rejected,
            atomic_file(self.output) as annotated,
        ):
            for row, outcome in self.outcomes():
                if not isinstance(outcome, RowOutcome):
                    totals.unfinished += 1
                    continue
                totals.add(row, outcome)
                if outcome.kept:
                    annotated.write(_output_line(row.annotated(outcome.kept)))
                for each in outcome.rejected(row):
                    rejected.write(_output_line(each))
        return totals

    def close(self) -> None:
        """Close the journal."""
        self.journal.close()


def files_beside(output: Path) -> tuple[Path, Path]:
    """Return the files of the rejected turns and of the replies that belong to an output."""
    return output.with_name(f"{output.stem}.rejected.jsonl"), output.with_name(f"{output.stem}.journal.jsonl")


def _output_line(row: dict[str, Any]) -> bytes:
    """Return a line of JSON. Half of a character, which a reply may have, becomes a question mark."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode(errors="replace") + b"\n"
