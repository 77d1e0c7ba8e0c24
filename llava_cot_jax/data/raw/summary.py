"""Counts of the rows that were written and skipped, by the data sets that a raw data set was made of."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

from llava_cot_jax.data.raw.annotations import AnnotationRow, Reason, Remark, SkippedRow
from llava_cot_jax.data.raw.names import Match

SPLITS = ("train", "validation")
ROWS = "rows"
UNSTAGED = "unstaged answers"
REPEATED = "repeated ids"

REMARKS_FILE = "remarks.jsonl"
"""Name of the file that lists the rows that are used and have remarks."""

ALWAYS = (ROWS, *SPLITS)
WHERE_ANY = (*Reason, *Match, UNSTAGED, REPEATED, *Remark)
NUMBER_OF_IMAGES = re.compile(r"(\d+) images")
"""Pattern of the columns that count the rows with a number of images other than one."""


@dataclass(frozen=True)
class Summary:
    """Counts of the rows of a data set.

    Attributes:
        sources: Counts by source and column: all rows, rows written to each split, rows skipped for each reason, and
            among the written rows those with a number of images other than one, those with an image that has not the
            name in the row but another by which it was found, those with remarks, the unstaged answers and repeated
            ids.
        unnamed_images: Number of files among the images that no row names.
    """

    sources: dict[str, dict[str, int]]
    unnamed_images: int

    @property
    def totals(self) -> Counter[str]:
        """Counts by column, over all sources."""
        return sum(map(Counter, self.sources.values()), Counter())

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.totals[ROWS]

    @property
    def skipped(self) -> int:
        """Number of rows that are skipped."""
        return sum(self.totals[reason] for reason in Reason)

    def table(self) -> str:
        """Return the counts as lines of text, with one line for each source and one for all."""
        totals = self.totals
        numbers = sorted(int(match[1]) for match in map(NUMBER_OF_IMAGES.fullmatch, totals) if match)
        columns = [*ALWAYS, *map(images_column, numbers), *(column for column in WHERE_ANY if totals[column])]
        headings = list(zip_longest(*(reversed(name.split()) for name in ("source", *columns)), fillvalue=""))[::-1]
        counts = {**self.sources, "all": self.totals}
        rows = [(source, *(f"{row.get(column, 0):,}" for column in columns)) for source, row in counts.items()]
        cells = [*headings, *rows]
        first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
        lines = [
            name.ljust(first) + "".join(f"  {cell:>{width}}" for cell, width in zip(others, widths, strict=True))
            for name, *others in cells
        ]
        if remarks := [remark.value for remark in Remark if totals[remark]]:
            lines.append(f"rows with {', '.join(remarks)} are named in {REMARKS_FILE}")
        return "\n".join([*lines, f"files that no row names: {self.unnamed_images:,}"])


def images_column(number: int) -> str:
    """Return the name of the column that counts the rows with a number of images other than one."""
    return f"{number} images"


def summarise(splits: dict[str, list[AnnotationRow]], skipped: Iterable[SkippedRow], unnamed_images: int) -> Summary:
    """Count the rows of each split and those skipped. An id counts as repeated in all its rows but the
    first, and rows without an id repeat none."""
    sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in skipped:
        sources[row.source].update((ROWS, row.reason.value))
    for split, entries in splits.items():
        for entry in entries:
            sources[entry.source].update({ROWS: 1, split: 1, UNSTAGED: entry.unstaged})
            sources[entry.source].update(remark.value for remark in entry.remarks)
            sources[entry.source].update({one.match.value for one in entry.found} - {Match.EXACT.value})
            if len(entry.images) != 1:
                sources[entry.source][images_column(len(entry.images))] += 1
    seen: set[str] = set()
    for entry in sorted((entry for entries in splits.values() for entry in entries), key=lambda entry: entry.line):
        sources[entry.source][REPEATED] += entry.id in seen
        seen |= {entry.id} - {""}
    return Summary({source: dict(+counts) for source, counts in sorted(sources.items())}, unnamed_images)
