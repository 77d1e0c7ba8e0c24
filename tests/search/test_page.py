"""A search as a person is shown it: on a page of its own, and as text."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import write_text
from llava_cot_jax.search import wording
from llava_cot_jax.search.page import PageEntry, render_page, write_page
from llava_cot_jax.search.page_images import PageImages
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.show import describe_search
from tests.processes import ROOT
from tests.search import traces
from tests.search.models import TRAINED_BEAM, scene, trained_model

ALL = {
    "token": traces.token_trace(),
    "ten": traces.token_trace(10),
    "rationale": traces.rationale_trace(),
    "scored": traces.scored_trace(),
    "vote": traces.whole_trace(),
    "verified": traces.verified_trace(),
    "weighted": traces.weighted_trace(),
    "greedy": traces.whole_trace("Greedy(max_new_tokens=2048)", 1),
    "sentences": traces.sentence_trace(),
    "retracing": traces.retracing_trace(),
    "untagged": traces.untagged_trace(),
}
every_trace = pytest.mark.parametrize("trace", ALL.values(), ids=ALL)

BRANCHED = [
    ["winner"],
    *(["", "continued", "winner"], ["continued", "", "winner", ""]),
    *(["continued", "", "continued"], ["", "continued", "", ""]),
    ["", "", "winner"],
]
"""How the candidates of each stage of the retracing search stand."""


def standings(trace) -> list[list[str]]:
    if trace is ALL["retracing"]:
        return BRANCHED
    return [["winner" if i == stage.winner else "" for i in range(len(stage.candidates))] for stage in trace.stages]


VOID = {"meta", "link", "img", "path", "circle", "input"}


class Page(HTMLParser):
    """What a browser makes of a page: the text under each class, in order, and all attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[tuple[str, set[str]]] = []
        self._texts: list[tuple[set[str], list[str]]] = []
        self.feed(html)
        self.close()
        assert not self._open, "each element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        classes = set((dict(attrs).get("class") or "").split()) | {tag}
        self._open.append((tag, classes))
        self._texts.append((classes, []))
        self._open[-1] = (tag, classes | {f"#{len(self._texts) - 1}"})

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        opened, _ = self._open.pop()
        assert opened == tag

    def handle_data(self, data):
        for _, classes in self._open:
            place = next(int(name[1:]) for name in classes if name.startswith("#"))
            self._texts[place][1].append(data)

    def texts(self, *classes: str) -> list[str]:
        """What stands in each element that has these classes, one of which may be its tag."""
        return ["".join(parts) for has, parts in self._texts if has >= set(classes)]


def words(text: str) -> str:
    return " ".join(text.split())


def printed(trace, width: int = 80, **known) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(describe_search(trace, **known))
    return file.getvalue()


@every_trace
def test_a_page_shows_every_candidate_and_which_won(trace):
    page = Page(render_page([PageEntry(trace)], {}))
    candidates = [one for stage in trace.stages for one in stage.candidates]
    shown = [text for text in page.texts("div", "text")]
    assert [text.removeprefix("(empty)") for text in shown] == [
        wording.printable(one.text).strip() for one in candidates
    ]
    cards = page.texts("li", "candidate")
    for card, one in zip(cards, candidates, strict=True):
        assert f"{one.tokens} token" in card and wording.ENDINGS[one.ended] in card
        assert one.added in card
        assert wording.log_prob(one.mean_log_prob).replace("-", "\N{MINUS SIGN}") in card
        assert wording.score(one) in card
        assert ("on neither yes nor no" in card) == (one.score is not None)
    winners = [f"Candidate {each.index('winner') + 1}" for each in standings(trace) if "winner" in each and each[1:]]
    assert [re.match(r"\s*(Candidate \d+)", card)[1] for card in page.texts("candidate", "won")] == winners


@every_trace
def test_a_page_shows_every_match_and_verdict(trace):
    page = Page(render_page([PageEntry(trace)], {}))
    matches = [match for stage in trace.stages for match in stage.matches]
    for text, match in zip(page.texts("div", "match"), matches, strict=True):
        assert f"{match.first + 1} against {match.second + 1} \N{RIGHTWARDS ARROW} {match.winner + 1} wins" in text
        assert wording.DECIDED_BY[match.decision] in text
        assert text.count("shown before") == len(match.verdicts)
        for verdict in match.verdicts:
            assert wording.verdict_result(verdict).replace("-", "\N{MINUS SIGN}") in text
            assert verdict.other_probability is None or f"{verdict.other_probability:.1%} on neither" in text
    checks = [check for stage in trace.stages for check in stage.checks]
    written = checks + [verdict for match in matches for verdict in match.verdicts]
    reasons = [verdict.reason for verdict in written if verdict.reason is not None]
    assert sorted(page.texts("blockquote")) == sorted(wording.printable(reason) for reason in reasons)
    assert len(page.texts("div", "check")) == len(checks)


@every_trace
def test_a_page_needs_nothing_but_itself(trace):
    """Nothing is loaded, nothing runs, and no text of the model becomes an element."""
    image = Image.effect_mandelbrot((300, 200), (-2, -1.2, 1, 1.2), 20)
    html = render_page(
        [PageEntry(trace, [image, ShapesRows("test")[0].images[0]], traces.HOSTILE)], {traces.HOSTILE: "<b>"}
    )
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "b", "i", "is", "all")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
    assert "url(" not in html and "@import" not in html and "http" not in html.replace("http-equiv", "")
    assert "\x1b" not in html and "\x00" not in html
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [one["class"] for one in images] == ["photo", "pixels"]
    assert all(one["alt"] for one in images)
    assert images[1]["width"] == "240"


def test_a_page_shows_what_each_candidate_of_a_retracing_search_continues():
    page = Page(render_page([PageEntry(ALL["retracing"])], {}))
    cards = page.texts("li", "candidate")
    told = [re.search(r"after candidate \d( of round \d)?", card) for card in cards]
    assert [each and each[0].removeprefix("after candidate ") for each in told] == [
        *[None] * 4,
        *["2", "2", "3", "3"],
        *[None] * 3,
        *["1", "1", "3", "3"],
        *["2 of round 2", "1 of round 1", "3 of round 1"],
    ]
    chips = [re.match(r"\s*Candidate \d(winner|continued|)\s", card)[1] for card in cards]
    assert chips == ["", *(standing for each in BRANCHED[1:] for standing in each)]  # there is one summary
    (lead,), guide = page.texts("p", "lead"), " ".join(page.texts("footer"))
    assert "only the winner" not in lead and "the same winners" not in guide
    assert "what each continues" in lead and "another round while" in guide


def test_a_page_draws_a_chain_for_stages_and_branches_for_rounds():
    """Candidates by column and height, and the lines between them."""

    def drawn(trace):
        page = Page(render_page([PageEntry(trace)], {}))
        circles = [one for tag, one in page.tags if tag == "circle"]
        spots = {(round(float(one["cx"])), round(float(one["cy"]))): one.get("class") for one in circles}
        columns = sorted({x for x, _ in spots})
        assert len(spots) == len(circles), "none covers another"

        def name(x: str, y: str) -> tuple[int, int]:
            column = sorted(spot for spot in spots if spot[0] == int(x))
            return columns.index(int(x)), column.index((int(x), int(y)))

        lines = [re.findall(r"-?\d+", one["d"]) for tag, one in page.tags if tag == "path"]
        won = sorted(name(*map(str, spot)) for spot, style in spots.items() if style == "won")
        (svg,) = [one for tag, one in page.tags if tag == "svg"]
        assert all(x < int(svg["width"]) and y < float(svg["height"]) for x, y in spots)
        return sorted((name(*numbers[:2]), name(*numbers[-2:])) for numbers in lines), won, svg["aria-label"]

    lines, won, label = drawn(ALL["retracing"])
    to_captions = [((1, 0), (2, i)) for i in range(6)]
    to_reasonings = [((2, parent), (3, i)) for i, parent in enumerate((1, 1, 2, 2, 3, 3, 5, 5))]
    to_conclusions = [((3, parent), (4, i)) for i, parent in enumerate((5, 0, 2))]
    assert lines == sorted([((0, 0), (1, 0)), *to_captions, *to_reasonings, *to_conclusions])
    assert won == [(0, 0), (1, 0), (2, 2), (3, 2), (4, 2)]
    steps = ["Summary 1", "Caption, round 1 3", "Reasoning, round 1 3", "Conclusion 3"]
    assert label == f"Candidates that led to the answer: {' then '.join(steps)}"
    lines, won, _ = drawn(ALL["verified"])
    assert lines == sorted(((i, 1 if i else 0), (i + 1, j)) for i in range(4) for j in range(3))
    assert won == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 1)]


def test_a_page_numbers_the_rounds_of_a_tournament():
    page = Page(render_page([PageEntry(ALL["token"])], {}))
    assert page.texts("h4")[4:6] == ["Round 1", "Final"]


def test_a_page_tells_right_from_wrong():
    four = traces.whole_trace()  # its answer
    entries = [
        PageEntry(four, right_answer="Four."),
        PageEntry(four, right_answer="4"),
        PageEntry(four, right_answer="4", correct=True),
    ]
    page = Page(render_page([*entries, PageEntry(four)], {"Model": "small", "Date": "2026-11-25"}))
    assert page.texts("p", "tally") == ["4 questions; 2 of 3 conclusions agree with the right answer"]
    results = [one["data-result"] for tag, one in page.tags if tag == "details" and one.get("class") == "entry"]
    assert results == ["right", "wrong", "right", "unknown"]
    assert [words(text) for text in page.texts("span", "right")] == [
        "Right answer Four. agrees",
        "Right answer 4 does not agree",
        "Right answer 4 right",
    ]
    assert page.texts("span", "answer") == ["four"] * 4
    assert [words(text) for text in page.texts("dl", "facts")] == ["Modelsmall Date2026-11-25"]
    assert "7,590" in page.texts("dl", "stats")[0] and "65 T" in page.texts("dl", "stats")[0]


@pytest.mark.slow
def test_a_page_holds_a_real_search(prompts, tmp_path):
    image, question = scene(1)
    answer = Reasoner(*trained_model(), TRAINED_BEAM, prompts).answer(image, question)
    path = tmp_path / "folder" / "page.html"
    write_page(path, [PageEntry(answer.trace, [image], "two")], {"Model": "shapes"})
    page = Page(path.read_text(encoding="utf-8"))
    assert page.texts("span", "answer") == [answer.conclusion]
    assert len(page.texts("li", "candidate")) == 12
    assert len(page.texts("div", "match")) == 8
    assert answer.conclusion in printed(answer.trace)


def test_images_are_smaller_where_there_are_many():
    photo, small = Image.new("RGB", (1600, 800)), Image.new("RGB", (40, 20))
    (alone,) = PageImages.for_number(1).embed([photo])
    assert (alone.width, alone.height) == (1024, 512)
    many = PageImages.for_number(500)
    first, second, third = many.embed([photo, small, photo])
    assert first.width == 505 and first.width**2 * 500 <= 128_000_000  # the root of a 500th of that, rounded down
    assert (second.width, second.height, second.small) == (240, 120, True)
    assert third is first and many.shared == {1: first}
    (unreadable,) = many.embed([b"no image"])
    assert not unreadable.uri and "image" in unreadable.fault


def test_a_large_page_is_told(tmp_path, monkeypatch, warnings_of):
    monkeypatch.setattr("llava_cot_jax.search.page.LARGE_PAGE", 1000)
    write_page(tmp_path / "page.html", [PageEntry(ALL["greedy"])], {})
    assert "page.html has 0 MB, which a browser takes seconds to open: ask fewer questions" in warnings_of.text


def test_a_page_that_cannot_be_written_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"page\.html cannot be written: "):
        write_page(tmp_path / "file" / "page.html", [], {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder cannot be written: "):
        write_page(tmp_path / "folder", [], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    write_text(path, "n\N{LATIN SMALL LETTER E WITH ACUTE}w")
    assert path.read_bytes() == b"n\xc3\xa9w"
    assert list(tmp_path.iterdir()) == [path]


@every_trace
@pytest.mark.parametrize("width", [80, 120])
def test_the_text_loses_nothing(trace, width):
    text = printed(trace, width, right_answer="four")
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in text and not any(line != line.rstrip() for line in lines)
    flat = words(text)
    for stage, stand in zip(trace.stages, standings(trace), strict=True):
        for number, one in enumerate(stage.candidates, start=1):
            assert words(wording.printable(one.text)) in flat
            name = f"{number} {stand[number - 1]}".strip()
            mean = wording.log_prob(one.mean_log_prob)
            score = f"{wording.score(one)}, " if one.score is not None else ""
            score = f"{wording.origin(one)}, {score}" if one.parent is not None else score
            facts = f"{score}mean log-probability {mean} a token, {wording.counted(one.tokens, 'token')}"
            assert f"{name}: {facts}" in flat
        for match in stage.matches:
            assert wording.match_result(match) in flat
        for verdict in stage.checks + [verdict for match in stage.matches for verdict in match.verdicts]:
            assert wording.verdict_result(verdict) in flat
            assert words(wording.printable(verdict.reason or "")) in flat
            assert wording.neither_share(verdict) in flat
    assert f"Answer {words(wording.printable(wording.conclusion_of(trace)))}" in flat
    assert "Right answer (agrees)" in flat or "Right answer (does not agree)" in flat


def test_a_word_longer_than_the_line_is_broken():
    word = "x" * 300
    trace = traces.make_trace([traces.StageTrace("whole", [traces.candidate(word)], [], [], 0)])
    assert printed(trace, 40).replace("\n", "").replace(" ", "").count(word) == 2  # the candidate, and the answer


def test_a_match_reads_as_one_line():
    match = traces.token_match(0, 2, -0.21)
    assert wording.match_result(match) == "1 against 3 -> 3 wins, margin -0.21"
    assert wording.verdict_result(match.verdicts[0]) == "1 shown before 3: for 3, vote -0.01"
    assert wording.verdict_result(match.verdicts[1]) == "3 shown before 1: for 3, vote +0.41"
    assert wording.neither_share(match.verdicts[0]) == "3.1% on neither verdict"


def test_what_chose_a_winner_is_said():
    def chosen(name: str) -> str:
        trace = ALL[name]
        return wording.how_chosen(trace.stages[0], trace.strategy)

    assert chosen("token") == "4 candidates, 2 wins its matches"
    assert chosen("scored") == "3 candidates, 3 has the highest mean log-probability"
    assert chosen("vote") == "3 candidates, 2 has the most common conclusion"
    assert chosen("verified") == "3 candidates, 2 has the highest score"
    assert chosen("weighted") == "3 candidates, 3 has the conclusion with the highest sum of scores"
    assert chosen("greedy") == "one candidate"


def test_a_score_reads_as_one_line():
    first, *_ = traces.verified_trace().stages[0].candidates
    assert wording.score(first) == "score 0.250, 50.0% on neither yes nor no"
    assert wording.score(traces.candidate("x")) == ""


def test_rounds_are_those_of_the_knockout():
    stage = traces.token_trace(10).stages[0]
    rounds = wording.rounds_of(stage)
    assert [len(matches) for matches, _ in rounds] == [5, 2, 1, 1]
    assert [len(through) for _, through in rounds] == [0, 1, 1, 0]
    assert rounds[-1][0][0].winner == stage.winner
    assert wording.rounds_of(traces.scored_trace().stages[0]) == []


def test_a_file_of_traces_becomes_a_page_as_the_guide_says(tmp_path, monkeypatch):
    guide = (ROOT / "llava_cot_jax" / "search" / "README.md").read_text()
    (code,) = [each for each in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "write_page" in each]
    monkeypatch.chdir(tmp_path)
    searches = [traces.token_trace(), traces.retracing_trace(), traces.whole_trace()]
    write_text(tmp_path / "runs/trace.json", json.dumps([trace.to_dict() for trace in searches]))
    exec(code, {})
    entries = [PageEntry(trace) for trace in searches]
    assert (tmp_path / "runs/trace.html").read_text() == render_page(entries, {"file": "runs/trace.json"})
