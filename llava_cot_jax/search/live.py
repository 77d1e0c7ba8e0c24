"""Live view of a search in the terminal: its stages, and the candidates of the present one while they are written."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from llava_cot_jax.search import wording
from llava_cot_jax.search.show import HEADING, MINOR, WINNER, styled
from llava_cot_jax.search.snapshots import OnSearchProgress, SearchSnapshot
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.search.trace import CandidateTrace, StageTrace
from llava_cot_jax.stage_format import StageFormat

_REFRESHES_PER_SECOND = 10

_LAYOUTS = ((2, 2), (1, 2), (2, 1), (1, 1), (0, 1))
"""Least numbers of lines for each finished stage and for each candidate. The first that fits the screen is taken."""

_INDENT = 5
"""Number of columns before the text of a candidate."""

_STEP = 1024
"""Number of characters after which a long text is wrapped from another place on. Lines stay as they are meanwhile."""

_LONGEST_LOGGED = 160
"""Number of characters of a winner's text in a line of a log."""


@contextmanager
def live_view(strategy: Strategy) -> Iterator[OnSearchProgress]:
    """Show a search on stderr while it runs: on a terminal until it ends, and elsewhere as lines that stay.

    Yields:
        Function that takes the snapshots of the search.
    """
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal or not console.file.isatty():
        yield SearchLog(strategy).update
        return
    view = SearchView(strategy)
    with Live(view, console=console, refresh_per_second=_REFRESHES_PER_SECOND, transient=True) as live:

        def show(snapshot: SearchSnapshot) -> None:
            view.update(snapshot)
            live.refresh()  # at once, so that no stage of a fast model passes unseen

        yield show


class SearchLog:
    """Prints a line on stderr when a stage begins, and one when it has its winner.

    Args:
        strategy: Strategy of the search.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = repr(strategy)
        self._begun = 0

    def update(self, snapshot: SearchSnapshot) -> None:
        """Print what is new in a snapshot."""
        number = len(snapshot.finished)
        if not snapshot.candidates:
            _log(f"{_title(snapshot, number - 1)}: {self._won(snapshot.finished[-1])}")
        elif self._begun == number:
            self._begun += 1
            _log(f"{_title(snapshot, number)}: writing {wording.counted(len(snapshot.candidates), 'candidate')}")

    def _won(self, stage: StageTrace) -> str:
        text = stage.candidates[stage.winner].text.strip()
        text = text if len(text) <= _LONGEST_LOGGED else f"{text[:_LONGEST_LOGGED]}..."
        return f"{_how_chosen(stage, self._strategy)}: {text}"


class SearchView:
    """The newest snapshot of a search, in as many lines as the terminal has room for.

    Args:
        strategy: Strategy of the search.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy, self._format = repr(strategy), strategy.to_spec().format
        self._snapshot: SearchSnapshot | None = None
        self._spinners = {is_ascii: Spinner("line" if is_ascii else "dots") for is_ascii in (False, True)}

    def update(self, snapshot: SearchSnapshot) -> None:
        """Take a snapshot, which is drawn from now on."""
        self._snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spinner = Text(str(self._spinners[options.ascii_only].render(console.get_time())), "status.spinner")
        lines = _Lines(console, options.max_width, options.ascii_only, self._format)
        rows = max(console.height - 1, 1)  # the cursor is in the last one when the view is removed
        if self._snapshot is None:
            yield lines.line(spinner, " reading the question")
        else:
            yield from _draw(self._snapshot, self._strategy, lines, rows, spinner)


def _draw(snapshot: SearchSnapshot, strategy: str, lines: "_Lines", rows: int, spinner: Text) -> list[Text]:
    """Return a snapshot in at most ``rows`` lines."""
    finished, chosen = list(snapshot.finished), None
    if not snapshot.candidates:  # of the next stage, so that there is time to see how the last one was chosen
        chosen = finished.pop()
    number, candidates = len(finished), chosen.candidates if chosen else snapshot.candidates
    coming = [wording.name_title(name) for name in snapshot.stages[number + 1 :]]
    room = rows - 1 - bool(coming)
    for_stage, for_candidate = _layout(room, number, len(candidates))
    drawn = [line for stage in finished for line in lines.finished(stage, strategy, for_stage)]
    happens = wording.how_chosen(chosen, strategy) if chosen else _what_happens(snapshot)
    drawn.append(lines.line(spinner, " ", (_title(snapshot, number), HEADING), f": {happens}"))
    shown = len(candidates) if len(candidates) <= room else max(room - 1, 0)
    for i, candidate in enumerate(candidates[:shown]):
        drawn += lines.candidate(i, candidate, chosen, for_candidate)
    if left_out := len(candidates) - shown:
        drawn.append(lines.line((f"  and {wording.counted(left_out, 'more candidate')}", MINOR)))
    if coming:
        drawn.append(lines.line((f"To come: {', '.join(coming)}", MINOR)))
    return drawn[:rows]


def _layout(room: int, finished: int, candidates: int) -> tuple[int, int]:
    """Return the numbers of lines for each finished stage, and at most for each candidate, in ``room`` lines."""
    for for_stage, for_candidate in _LAYOUTS:
        if (left := room - for_stage * finished) >= for_candidate * candidates:
            return for_stage, left // candidates
    return 0, 1


@dataclass(frozen=True)
class _Lines:
    """Makes lines of texts, none of them longer than the screen is wide.

    Attributes:
        console: Console that wraps texts.
        width: Columns of the screen.
        is_ascii: Whether the screen shows nothing but ASCII.
        format: Format of the stages, whose tags are shown dimly.
    """

    console: Console
    width: int
    is_ascii: bool
    format: StageFormat

    def line(self, *parts: str | Text | tuple[str, str]) -> Text:
        """Return a line of parts, each a text or a text with its style, without what the screen has no room for."""
        shown = [(self._shown(part[0]), part[1]) if isinstance(part, tuple) else part for part in parts]
        line = Text.assemble(*(self._shown(part) if isinstance(part, str) else part for part in shown))
        return self._truncated(line, self.width)

    def finished(self, stage: StageTrace, strategy: str, count: int) -> list[Text]:
        """Return a stage that has its winner in ``count`` lines, at most two."""
        name, text = (wording.name_title(stage.stage), HEADING), self._styled(stage.candidates[stage.winner].text)
        if count == 1:
            return [self.line(name, ": ", text)]
        won = (f"  {stage.winner + 1} winner", WINNER)
        return [self.line(name, f": {_how_chosen(stage, strategy)}"), self.line(won, ": ", text)][:count]

    def candidate(self, number: int, candidate: CandidateTrace, chosen: StageTrace | None, count: int) -> list[Text]:
        """Return a candidate in at most ``count`` lines, which have the end of its text.

        Args:
            number: Index of the candidate.
            candidate: The candidate.
            chosen: Its stage, once that has a winner.
            count: Number of lines.
        """
        has_won = chosen is not None and number == chosen.winner
        name = (f"  {number + 1}{' winner' if has_won else ''}", WINNER if has_won else "")
        facts = wording.candidate_facts(candidate, chosen) if chosen else wording.length_and_end(candidate)
        head = self.line(name, f": {facts}")
        if count == 1:
            return [self._end_of_text(self._truncated(head, self.width // 2).append("  "), candidate.text)]
        if count == 2:
            return [head, self._end_of_text(Text(" " * _INDENT), candidate.text)]
        return [head, *self._last_lines(candidate.text, count - 1)]

    def _truncated(self, line: Text, columns: int) -> Text:
        line.truncate(columns, overflow="crop" if self.is_ascii else "ellipsis")
        return line

    def _styled(self, text: str) -> Text:
        return styled(" ".join(self._shown(text).split()), self.format)

    def _shown(self, text: str) -> str:
        """Return a text with signs for the characters that a line, or the screen, does not show."""
        visible = wording.printable(text).replace("\n", " ").replace("\t", " ")
        return visible.encode("ascii", "backslashreplace").decode() if self.is_ascii else visible

    @property
    def _cut(self) -> Text:
        """Mark of a text whose beginning is left out."""
        return Text("... " if self.is_ascii else "… ", MINOR)

    def _last_lines(self, text: str, count: int) -> list[Text]:
        """Return the last ``count`` lines of a text, after a mark where that is not all of it."""
        whole, columns = self._styled(text), max(self.width - _INDENT, 1)
        start = max(len(whole) - columns * count, 0) // _STEP * _STEP
        wrapped = list(whole[start:].wrap(self.console, columns, overflow="fold"))
        is_cut = start > 0 or len(wrapped) > count
        margins = [self._cut if is_cut and i == 0 else Text() for i in range(count)]
        for margin in margins:
            margin.pad_left(_INDENT - len(margin))
        return [self.line(margin, row) for margin, row in zip(margins, wrapped[-count:], strict=False)]

    def _end_of_text(self, head: Text, text: str) -> Text:
        """Return ``head`` and, in the same line, a text, or its end after a mark where there is no room for all."""
        whole, columns = self._styled(text), max(self.width - head.cell_len, 0)
        if whole.cell_len <= columns:
            return self.line(head, whole)
        columns -= self._cut.cell_len
        whole = whole[max(len(whole) - columns, 0) :]
        while whole and (whole.cell_len > columns or whole.plain[0] == " "):
            whole = whole[1:]
        return self.line(head, self._cut, whole)


def _title(snapshot: SearchSnapshot, number: int) -> str:
    """Return the name of a stage, with its place where there are several."""
    count, name = len(snapshot.stages), wording.name_title(snapshot.stages[number])
    return f"{name}, stage {number + 1} of {count}" if count > 1 else name


def _what_happens(snapshot: SearchSnapshot) -> str:
    """Return what is happening to the candidates of a snapshot."""
    count, ended = len(snapshot.candidates), snapshot.num_ended
    if ended < count:
        has_ended = f", {ended} {'has' if ended == 1 else 'have'} ended" if ended else ""
        return f"writing {wording.counted(count, 'candidate')}{has_ended}"
    return f"choosing among {count} candidates" if count > 1 else "one candidate"


def _how_chosen(stage: StageTrace, strategy: str) -> str:
    """Return how the winner of a stage was chosen, with the scores of all candidates, if there are any."""
    scores = [candidate.score for candidate in stage.candidates]
    chosen = wording.how_chosen(stage, strategy)
    if all(score is None for score in scores):
        return chosen
    told = ", ".join("none" if score is None else f"{score:.3g}" for score in scores)
    return f"{chosen} (score{'' if len(scores) == 1 else 's'} {told})"


def _log(line: str) -> None:
    print(" ".join(wording.printable(line).split()), file=sys.stderr, flush=True)
