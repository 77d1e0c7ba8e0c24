"""A whole search as text for a terminal: all candidates, all verdicts, and the answer."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from llava_cot_jax.search import wording
from llava_cot_jax.search.trace import CandidateTrace, StageTrace, Trace, VerdictTrace
from llava_cot_jax.stage_format import StageFormat

WINNER, MINOR, HEADING = "bold green", "dim", "bold"


def describe_search(trace: Trace, right_answer: str | None = None, correct: bool | None = None) -> RenderableType:
    """Return a search as text to read, for ``rich.console.Console.print``.

    Texts of the model are shown in full: they are wrapped, never cut, and never taken for markup.

    Args:
        trace: Trace of the search.
        right_answer: Right answer to the question, if it is known.
        correct: Whether the conclusion is right. By default, whether it equals ``right_answer`` apart from case,
            spacing, and punctuation at the ends.
    """
    return Group(*_describe(trace, right_answer, correct))


def _describe(trace: Trace, right_answer: str | None, correct: bool | None) -> Iterator[RenderableType]:
    yield Text("Question", style=HEADING)
    yield _block(trace.question, 2)
    for place, stage in enumerate(trace.stages):
        standings = wording.standings(trace, place)
        yield Text()
        yield Text.assemble((wording.stage_title(stage), HEADING), ": ", wording.how_chosen(stage, trace.strategy))
        for number, candidate in enumerate(stage.candidates):
            yield from _describe_candidate(number, candidate, standings[number], stage, trace.format)
        if stage.checks:
            yield _line("Checks, without the image", 2)
            for check in stage.checks:
                yield from _describe_verdict(check, 4)
        if stage.matches:
            yield _line("Matches", 2)
        for match in stage.matches:
            decided = f", {wording.DECIDED_BY.get(match.decision, match.decision)}"
            yield _line(wording.match_result(match) + decided, 4)
            for verdict in match.verdicts:
                yield from _describe_verdict(verdict, 6)
    conclusion = wording.conclusion_of(trace)
    yield Text()
    yield Text("Answer", style=HEADING)
    yield _block(conclusion, 2)
    if right_answer is not None:
        right = wording.agrees(conclusion, right_answer) if correct is None else correct
        mark = ("agrees", WINNER) if right else ("does not agree", "bold red")
        yield Text.assemble(("Right answer", HEADING), " (", mark, ")")
        yield _block(right_answer, 2)
    yield Text()
    yield Text(wording.cost_line(trace), style=MINOR)


def _describe_candidate(
    number: int, candidate: CandidateTrace, standing: str, stage: StageTrace, format: StageFormat
) -> Iterator[RenderableType]:
    name = Text(f"{number + 1} {standing}".rstrip(), style=WINNER if standing == "winner" else "")
    yield _line(Text.assemble(name, ": ", wording.candidate_facts(candidate, stage)))
    texts = [each.text for each in stage.candidates]
    if (first := texts.index(candidate.text)) < number:
        yield _Indented(Text(f"the same text as {first + 1}", style=MINOR), 5)
        return
    yield _Indented(styled(candidate.text, format) or Text("(empty)", style=MINOR), 5)


def styled(text: str, format: StageFormat) -> Text:
    """Return the text of a candidate with its tags in a minor style, and control characters made visible."""
    shown = Text()
    for part, is_tag in wording.split_tags(text, format):
        shown.append(part, style=MINOR if is_tag else "")
    return shown


def _describe_verdict(verdict: VerdictTrace, indent: int) -> Iterator[RenderableType]:
    yield _line(", ".join(filter(None, (wording.verdict_result(verdict), wording.neither_share(verdict)))), indent)
    if verdict.reason is not None:
        yield _block(verdict.reason, indent + 3)


def _line(text: Text | str, indent: int = 2) -> "_Indented":
    return _Indented(Text(text) if isinstance(text, str) else text, indent)


def _block(text: str, indent: int) -> "_Indented":
    """Return ``text`` indented, with control characters made visible."""
    return _Indented(Text(wording.printable(text).strip()), indent)


@dataclass(frozen=True)
class _Indented:
    """A wrapped, indented text. Unlike ``rich.padding.Padding`` it leaves no spaces at the ends of lines."""

    text: Text
    indent: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # A word that is longer than the line is broken, not cut.
        for line in self.text.wrap(console, max(options.max_width - self.indent, 1), overflow="fold"):
            line.rstrip()
            yield Text(" " * self.indent) + line if line else line
