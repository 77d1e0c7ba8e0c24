"""Live view of a search: frames that fit any screen, with the ends of texts, and lines for a log."""

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from llava_cot_jax.search.live import SearchLog, SearchView
from llava_cot_jax.search.snapshots import SearchSnapshot
from llava_cot_jax.search.strategies import BestOfN, StageBeam
from llava_cot_jax.search.trace import StageTrace
from tests.search.traces import HOSTILE, LONG, candidate

STAGES = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")

TEXTS = {
    "short": " so two </REASONING>",
    "empty": "",
    "long": LONG * 8,
    "hostile": HOSTILE * 20 + "\x85\u2028\x1b[2J\r\n\t\x07\ud800",
    "wide": "\N{CJK UNIFIED IDEOGRAPH-6570}\u0301" * 1200,
}


def growing(text: str, count: int, ended: int):
    """Candidates that go on, after some that have ended."""
    done = [candidate(text, ended="max_new_tokens", added=" </REASONING>")] * ended
    return tuple(done + [candidate(text, ended="")] * (count - ended))


def stage(name: str, text: str, count: int, score: float | None = None) -> StageTrace:
    """A stage whose second candidate has won."""
    candidates = [replace(candidate(text), score=score, other_probability=score and 0.1) for _ in range(count)]
    return StageTrace(name, candidates, [], [], min(1, count - 1))


def snapshots(text: str, count: int) -> list[SearchSnapshot]:
    """Snapshots of all moments of a stage, with from none to three stages before it."""
    found = []
    for before in range(4):
        finished = tuple(stage(name, text, count) for name in STAGES[:before])
        chosen = stage(STAGES[before], text, count, 0.75)
        found += [SearchSnapshot(STAGES, finished, growing(text, count, ended)) for ended in {0, 1, count}]
        found.append(SearchSnapshot(STAGES, (*finished, chosen)))
    return found


def frame(snapshot: SearchSnapshot | None, columns: int = 80, rows: int = 24, encoding: str = "utf-8") -> list[str]:
    """The lines of a snapshot on a screen."""
    view = SearchView(StageBeam())
    if snapshot is not None:
        view.update(snapshot)
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    console = Console(file=file, width=columns, height=rows, force_terminal=True, color_system=None)
    console.print(view)
    file.flush()
    return file.buffer.getvalue().decode(encoding).split("\n")[:-1]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_frame_is_larger_than_the_screen(text, encoding):
    for columns, rows in ((80, 24), (200, 24), (30, 10), (3, 2)):
        for count in (1, 4, 10):
            for snapshot in (None, *snapshots(TEXTS[text], count)):
                lines = frame(snapshot, columns, rows, encoding)
                assert 1 <= len(lines) < max(rows, 2)
                assert max(map(cell_len, lines)) <= columns
                assert all(line.isprintable() for line in lines)


def test_texts_are_no_markup_and_their_control_characters_are_seen():
    lines = frame(SearchSnapshot(STAGES, (), growing("[bold red]a[/] \x1b[2J", 1, 0)))
    assert "     [bold red]a[/] \N{SYMBOL FOR ESCAPE}[2J" in lines


def test_a_frame_has_the_ends_of_texts_and_tells_what_is_left_out():
    words = " ".join(map(str, range(1000)))
    snapshot = SearchSnapshot(STAGES, (stage("SUMMARY", "few", 4),), growing(words, 4, 1))
    lines = frame(snapshot)
    assert lines[:3] == ["Summary: 4 candidates, 2 has the highest mean log-probability", "  2 winner: few", lines[2]]
    assert lines[2].endswith(" Caption, stage 2 of 4: writing 4 candidates, 1 has ended")
    assert lines[3] == "  1: 1,000 tokens, cut off at the token limit, </REASONING> added"
    assert lines[4].startswith("   \N{HORIZONTAL ELLIPSIS} ") and lines[-1] == "To come: Reasoning, Conclusion"
    assert [line for line in lines if line.endswith(" 999")] == [lines[6], lines[10], lines[14], lines[18]]
    assert len(lines) == 20
    small = frame(snapshot, rows=6)
    assert [line[:9] for line in small[1:]] == ["  1: 1,00", "  2: 1,00", "  and 2 m", "To come: "]
    assert all(line.endswith(" 999") for line in small[1:3])


def test_a_text_grows_at_its_end_alone():
    """Its lines stay as they are, and move up."""
    words = [str(i) for i in range(600)]
    before: list[str] = []
    for end in range(300, 330):
        lines = frame(SearchSnapshot(("whole",), (), growing(" ".join(words[:end]), 2, 0)), 60, 12)[2:6]
        lines[0] = lines[0].replace("\N{HORIZONTAL ELLIPSIS}", " ")
        assert not before or before[:-1] == lines[:-1] or before[1:-1] == lines[:-2]
        before = lines


def test_scores_are_shown_with_the_winner_and_then_in_the_line_of_the_stage():
    chosen = stage("SUMMARY", "text", 2, 0.75)
    lines = frame(SearchSnapshot(STAGES, (chosen,)))
    assert lines[0].endswith(" Summary, stage 1 of 4: 2 candidates, 2 has the highest score")
    assert lines[3].startswith("  2 winner: score 0.750, 10.0% on neither yes nor no, mean log-prob")
    lines = frame(SearchSnapshot(STAGES, (chosen,), growing("", 2, 0)))
    assert lines[:2] == ["Summary: 2 candidates, 2 has the highest score (scores 0.75, 0.75)", "  2 winner: text"]


def test_a_log_has_two_lines_for_each_stage(capsys):
    log = SearchLog(BestOfN())
    for snapshot in snapshots(LONG, 3)[:4]:
        log.update(replace(snapshot, stages=("whole",)))
    begun, won = capsys.readouterr().err.splitlines()
    assert begun == "Whole answers: writing 3 candidates"
    start = "Whole answers: 3 candidates, 2 has the highest score (scores 0.75, 0.75, 0.75): The chart has four bars, "
    assert won.startswith(start) and won.endswith("...") and len(won) < 250
    SearchLog(BestOfN()).update(SearchSnapshot(("whole",), (stage("whole", "\x1b[2J\na", 1),)))
    assert capsys.readouterr().err == "Whole answers: one candidate: \N{SYMBOL FOR ESCAPE}[2J a\n"
