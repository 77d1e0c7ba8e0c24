"""The page of an evaluation: what it says, and, in a browser, how it is used."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluate import main
from llava_cot_jax.evaluation.page import page_entry, write_evaluation_page
from llava_cot_jax.evaluation.results import summarize
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.question_files import QuestionRow
from llava_cot_jax.search import wording
from llava_cot_jax.search.trace import Trace
from llava_cot_jax.stage_format import LLAVA_COT
from tests.browser import DESKTOP, PHONE, open_browser, opened, tab_to
from tests.search import traces

HOSTILE = (
    "</noscript></summary></details></script><script>window.taken = 1</script><img src=x onerror='window.taken = 2'> "
    f'" onfocus="window.taken = 3" autofocus x=" &lt; {{{{ 7 * 7 }}}} {traces.HOSTILE}'
)
"""A text that would be elements, attributes or a script where a page took it for these."""

CATEGORIES = ["count", HOSTILE, None]


def changed_trace(changed: bool) -> Trace:
    """A vote of three whole answers for "four", of which the first says so too unless the vote changes the answer."""
    trace = traces.whole_trace()
    if changed:
        return trace
    stage = trace.stages[0]
    same = replace(stage.candidates[0], text=stage.candidates[1].text.replace("Plan 1", "Plan 0"))
    return replace(trace, stages=[replace(stage, candidates=[same, *stage.candidates[1:]])])


def row_of(i: int) -> dict:
    """The scored row of a question: every third is wrong, every other is changed by the search, one has no answer."""
    trace = changed_trace(i % 2 == 0)
    trace.question = f"Question {i}" + (f" {HOSTILE}" if i == 4 else "")
    known = {"answer": "four" if i % 3 else ["five", 6], "match": "exact", "category": CATEGORIES[i % 3]}
    about = {"id": f"test-{i}", "question": trace.question, "images": [f"{i % 7}.png"], "seed": i}
    if i == 11:
        return about | known | {"error": "7.png does not exist: name a file", "right": False}
    return (
        about
        | known
        | {"scored": "FOUR" if i == 2 else "four", "right": bool(i % 3), "tokens": trace.tokens, "flops": trace.flops}
        | {"trace": trace.without_seconds()}
    )


ROWS = json.loads(json.dumps([row_of(i) for i in range(12)]))
"""Scored rows, as they are read from a file."""


def picture(i: int) -> bytes | str:
    """A large image of noise, a small one, or a file that is missing; those of 7 and on are those of 0 and on."""
    if i == 11:
        return "7.png"
    noise = np.random.default_rng(i % 7).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    file = io.BytesIO()
    (ShapesRows("test")[1].images[0] if i % 7 == 1 else Image.fromarray(noise)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def result() -> dict:
    run = {
        "search": "MajorityVote(num_candidates=3)",
        "checkpoint": "shapes",
        "adapter": None,
        "seed": 0,
        "match": None,
    }
    environments = [{"device": "1 x cpu", "jax": "0.10.2"}]
    return {"benchmark": "shapes", "sha256": "ab" * 32, **summarize(ROWS), "run": run, "environments": environments}


@pytest.fixture(scope="module")
def path(result, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    questions = [
        QuestionRow(row["id"], row["question"], None, row["images"], [picture(i)]) for i, row in enumerate(ROWS)
    ]
    write_evaluation_page(path, result, questions, ROWS, LLAVA_COT)
    return path


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


def shown(page: Page) -> list[int]:
    """Numbers of the rows whose questions can be seen."""
    script = "all => all.filter(one => one.checkVisibility()).map(one => Number(one.id.split('-')[1]) - 1)"
    found = page.locator("details.entry").evaluate_all(script)
    assert page.locator("#count").inner_text() == f"{len(found)} of {len(ROWS)} questions shown"
    return found


def rows_where(test) -> list[int]:
    return [i for i, row in enumerate(ROWS) if test(row)]


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_a_browser_a_test_is_skipped_but_fails_in_ci(monkeypatch, ci, outcome):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="apt-get install chromium"), open_browser():
        pass


def test_filters_by_the_keyboard_alone(browser: Browser, path):
    with opened(browser, path) as found:
        page, press = found.page, found.page.keyboard.press
        assert shown(page) == list(range(12))
        tab_to(page, "input[name=result]")
        press("ArrowRight")
        assert shown(page) == rows_where(lambda row: row["right"]) == [1, 2, 4, 5, 7, 8, 10]
        press("ArrowRight")
        assert shown(page) == rows_where(lambda row: not row["right"] and "error" not in row) == [0, 3, 6, 9]
        press("ArrowRight")
        assert shown(page) == rows_where(lambda row: "error" in row) == [11]
        press("ArrowRight")  # from the last to the first: all
        tab_to(page, "input[name=change]")
        press("ArrowRight")
        assert shown(page) == [0, 2, 4, 6, 8, 10]
        press("ArrowRight")
        assert shown(page) == [1, 3, 5, 7, 9]
        tab_to(page, "select")
        press("ArrowDown")
        hostile = rows_where(lambda row: row["category"] == HOSTILE)
        assert shown(page) == [i for i in hostile if i % 2 and i != 11] == [1, 7]
        tab_to(page, "button")
        press("Space")
        assert shown(page) == list(range(12))


def test_a_text_is_sought_in_questions_and_in_what_is_folded(browser: Browser, path):
    with opened(browser, path) as found:
        page = found.page
        tab_to(page, "input[type=search]")
        page.keyboard.type("TEST-7")
        assert shown(page) == [7]
        page.keyboard.press("Control+A")
        page.keyboard.type("Plan 2.")  # in the third candidate of each
        assert shown(page) == rows_where(lambda row: "error" not in row)
        page.keyboard.press("Control+A")
        page.keyboard.type('a < b && c > d: "x" <SCRIPT>')
        assert shown(page) == rows_where(lambda row: "error" not in row)
        page.keyboard.press("Control+A")
        page.keyboard.type("class=")  # is no text of the page, but a part of its elements
        assert shown(page) == []


def test_questions_are_walked_and_opened_by_the_keyboard(browser: Browser, path):
    with opened(browser, path) as found:
        page, press = found.page, found.page.keyboard.press
        place = "document.activeElement.closest('details.entry')?.id"
        press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        press("Enter")
        for key, number in (("j", 1), ("j", 2), ("j", 3), ("k", 2)):
            press(key)
            assert page.evaluate(place) == f"question-{number}"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        opened_question = page.locator("#question-2")
        assert opened_question.locator(".candidate").count() == 0
        press("Enter")
        opened_question.locator(".stage").first.wait_for()
        press("Tab")
        press("Enter")
        texts = opened_question.locator(".candidate .text")
        candidates = ROWS[1]["trace"]["stages"][0]["candidates"]
        assert texts.all_inner_texts() == [wording.printable(one["text"]).strip() for one in candidates]
        assert "kept the answer" in opened_question.locator(".stats").inner_text()
        press("j")  # from within the question that is open
        assert page.evaluate(place) == "question-3"
        press("Enter")
        said = page.locator("#question-3 .stats")
        said.wait_for()
        assert "changed the answer, which is five in candidate 1" in said.inner_text()
        assert page.locator(".given > .small:visible").all_inner_texts() == ["compared as FOUR"]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_window(browser: Browser, path, size):
    with opened(browser, path, size) as found:
        page = found.page
        width = "document.documentElement.scrollWidth"
        assert page.evaluate(width) == size["width"]
        page.locator(".more > summary").first.click()
        for number in (5, 12):
            page.locator(f"#question-{number} > summary").click()
        page.locator("#question-5 .stage > summary").first.click()
        assert page.locator("#question-5 .candidate").count() == 3
        assert page.evaluate(width) == size["width"]


def test_a_hostile_text_stays_a_text(browser: Browser, path):
    with opened(browser, path) as found:
        page = found.page
        page.locator("#question-5 > summary").click()
        page.locator("#question-5 .stage").first.wait_for()
        assert page.locator("#question-5 h2").inner_text() == wording.printable(f"Question 4 {HOSTILE}")
        assert wording.printable(HOSTILE) in page.locator("#question-5 .eyebrow").first.text_content()
        assert page.evaluate("window.taken === undefined")
        assert page.locator("details.entry").count() == 12 and page.locator("script").count() == 1
        assert page.locator("main img[src=x], [onerror], [onfocus]").count() == 0


def test_every_image_is_decoded_and_embedded_once(browser: Browser, path):
    html = path.read_text()
    uris = re.findall(r'(?:src|href)="(data:image/(?:jpeg|png)[^"]*)"', html)
    assert len(uris) == len(set(uris)) == 7  # of twelve questions: five share theirs with another, and one is missing
    with opened(browser, path) as found:
        page = found.page
        sides = page.locator("img").evaluate_all(
            "all => Promise.all(all.map(async one => (await one.decode(), [one.naturalWidth, one.naturalHeight])))"
        )
        assert sides == [[400, 300]] * 3
        shared = page.locator("svg image").evaluate_all(
            "all => Promise.all(all.map(async one => { const image = new Image(); image.src = one.href.baseVal; "
            "await image.decode(); return image.naturalWidth; }))"
        )
        assert len(shared) == 4 and 400 in shared
        uses = page.locator("svg use").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
        assert len(uses) == 8 and min(uses) > 0
        page.locator("#question-12 > summary").click()
        assert "7.png does not exist" in page.locator("#question-12 .pictures").inner_text()
        assert "7.png does not exist: name a file" in page.locator("#question-12 > .warn").inner_text()


def test_it_is_read_without_scripts_too(browser: Browser, path):
    with opened(browser, path, scripts=False) as found:
        page = found.page
        assert not page.locator("#filters").is_visible()
        page.locator("#question-2 > summary").click()
        page.locator("#question-2 .stage > summary").first.click()
        assert page.locator("#question-2 .candidate").first.is_visible()


def test_the_table_has_the_result(browser: Browser, path, result):
    with opened(browser, path) as found:
        text = found.page.locator(".table").inner_text()
        every = result["accuracy"]["all"]
        assert every["clusters"] < every["questions"]
        share, error, clustered = every["accuracy"], every["standard_error"], every["clustered_standard_error"]
        assert f"all\t12\t7\t{share:.1%}\t{error:.1%}\t{clustered:.1%}" in text
        assert "count\t4\t0\t0.0%" in text
        facts = found.page.locator("dl.facts").first.inner_text()
        assert "MajorityVote(num_candidates=3)" in facts and "1 x cpu" in facts
        assert found.page.locator(".tally").inner_text() == "12 questions; 7 of 12 answers are right"


@pytest.mark.slow
def test_evaluate_writes_a_page_also_of_answers_that_are_there(browser: Browser, tmp_path, monkeypatch, capsys):
    """The page has the conclusions and the right answers of the rows, and the images of the questions."""
    search = ["--search", "majority_vote", "--num_candidates", "2", "--max_new_tokens", "90"]
    arguments = ["--benchmark", "shapes", "--limit", "5", "--output", str(tmp_path / "run"), *search]
    main(arguments)
    monkeypatch.setattr(Mllama, "from_pretrained", lambda *_, **__: pytest.fail("the weights are loaded"))
    page_path = tmp_path / "pages" / "shapes.html"
    main([*arguments, "--page", str(page_path)])
    assert f"wrote the page to {page_path}" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    with opened(browser, page_path) as found:
        page = found.page
        assert page.locator(".answer").all_inner_texts() == [row["conclusion"] for row in rows]
        assert page.locator(".right .text").all_inner_texts() == [row["answer"] for row in rows]
        chips = page.locator(".right .chip").all_inner_texts()
        assert chips == ["right" if row["right"] else "wrong" for row in rows]
        page.locator("#question-1 > summary").click()
        page.locator("#question-1 .stage").first.wait_for()
        texts = page.locator("#question-1 .candidate .text").all_text_contents()
        assert texts == [one["text"].strip() for one in rows[0]["trace"]["stages"][0]["candidates"]]
        widths = "all => Promise.all(all.map(async one => (await one.decode(), one.naturalWidth)))"
        world = ShapesRows("test", size=5)
        assert page.locator("img").evaluate_all(widths) == [world[i].images[0].width for i in range(5)]


def test_a_page_that_cannot_be_written_is_told_first(tmp_path):
    with pytest.raises(UserError, match="it is a folder; name a file"):
        main(["--benchmark", "shapes", "--limit", "4", "--output", str(tmp_path / "run"), "--page", str(tmp_path)])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_answer_of_an_earlier_version_has_no_page():
    row = {name: value for name, value in row_of(0).items() if name != "trace"}
    with pytest.raises(UserError, match="the answer to 'test-0' has no trace, as an earlier version wrote it"):
        page_entry(row, [], LLAVA_COT)
