"""Judge of a benchmark: what VLMEvalKit makes of its replies, and what becomes of those that fail."""

import json
import time
from itertools import pairwise

import pytest

from llava_cot_jax.errors import TransientError, UserError
from llava_cot_jax.evaluation.benchmarks import grader as grader_module
from llava_cot_jax.evaluation.benchmarks import kit_scores
from llava_cot_jax.evaluation.benchmarks.grader import Grader
from llava_cot_jax.evaluation.benchmarks.kit_install import INSTALL_KIT, kit_fault
from llava_cot_jax.evaluation.benchmarks.kit_scores import score_predictions
from tests.evaluation.benchmark_files import planted, questions_of
from tests.evaluation.stand_in_judge import judge, mathvista_prediction, mmvet_row

assert kit_fault() is None, f"these tests need VLMEvalKit: {INSTALL_KIT}"

KEY = "sk-stand-in-7f3a"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / ".netrc").write_text("default login someone password secret\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    # The kit would ask elsewhere by these, and past the relay.
    for name in ("OPENAI_API_BASE", "BOYUE_API_BASE", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/none")
    monkeypatch.setenv("BOYUE", "1")
    monkeypatch.setenv("LOCAL_LLM", "another")
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # for the way from the relay to the judge
    monkeypatch.setattr(grader_module, "_WAITS", (0.01,) * 7)


def scored(name, folder, conclusions, stand_in):
    questions = questions_of(name, folder)
    grader = Grader.from_options(stand_in.url, "judge/o1-of-tests")
    return score_predictions(questions.benchmark, questions.table, planted(questions, folder, conclusions), grader)


MMVET = ["x = -1", "a pug", "A man, to look", "stop"]


def grade(text, before):
    """Grade MM-Vet's rows: the first 0.5, the second 1, and the others 0.25."""
    right, _ = mmvet_row(text)
    return {"-1 <AND> -5": "0.5", "a pug <OR> pug": "1.0"}.get(right, " 0.25\n")


@pytest.mark.slow
def test_mmvet_with_a_judge_that_fails_at_first(tmp_path):
    """Each row meets a failure of its own kind at first, and no grade is lost or asked for twice.

    By hand: all (0.5 + 1 + 0.25 + 0.25) / 4, math 0.5. The kit counts a row that needs one capability alone twice in
    the line of that capability: rec (1 + 1 + 0.25) / 3, ocr (0.5 + 0.25 + 0.25) / 3.
    """
    faults = {"x = -1": 503, "a pug": (429, {"Retry-After": "0"}), "A man, to look": None, "stop": b"<html>busy</html>"}

    def reply(text, before):
        return grade(text, before) if before else faults[mmvet_row(text)[1]]

    with judge(reply) as stand_in:
        scores = scored("mmvet", tmp_path, MMVET, stand_in)
        asked = stand_in.bodies
        assert scores["by"] == {"model": "judge/o1-of-tests", "url": f"{stand_in.url}/chat/completions"}
        assert stand_in.keys == {f"Bearer {KEY}"}
        assert {body["model"] for body in asked} == {"judge/o1-of-tests"} and len(asked) == 8
        table = {row["Category"]: (row["tot"], row["acc"]) for row in scores["tables"]["capabilities"]}
        assert table == {
            "rec": (3, 75), "ocr": (3, pytest.approx(100 / 3)), "know": (1, 25),
            "gen": (1, 25), "spat": (1, 25), "math": (1, 50), "Overall": (4, 50),
        }  # fmt: skip
        assert {row["Category"]: row["acc"] for row in scores["tables"]["combinations"]}["ocr_math"] == 50
        assert scores["judge_requests"] == {"requests": 4, "kept": 0, "retries": 4, "asked": 4, "unread": 0}
        again = scored("mmvet", tmp_path, MMVET, stand_in)
        assert len(asked) == 8
    assert again["tables"] == scores["tables"]
    assert again["judge_requests"] == {"requests": 4, "kept": 4, "retries": 0, "asked": 4, "unread": 0}
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_replies_that_cannot_be_read_are_counted(tmp_path):
    """The kit asks five times, each time with a higher temperature, and then grades 0: it is told beside the score."""

    def reply(text, before):
        return "" if mmvet_row(text)[1] == "stop" else "fine" if mmvet_row(text)[1] == "a pug" else grade(text, before)

    with judge(reply) as stand_in:
        scores = scored("mmvet", tmp_path, MMVET, stand_in)
    table = {row["Category"]: row["acc"] for row in scores["tables"]["capabilities"]}
    assert table["Overall"] == pytest.approx(100 * (0.5 + 0.25) / 4)
    assert scores["judge_requests"] == {"requests": 12, "kept": 0, "retries": 0, "asked": 4, "unread": 2}


@pytest.mark.slow
def test_mathvista(tmp_path):
    """Right are rows 1 and 3 without the judge, and 5 with it; the kit's rules cannot count a list as right.

    The judge's words for row 2 name no choice, and those for row 4 no number.
    """
    found = {"1.45 m": "1.45", "neither": "??", "about seven": "seven", "2007, 2008": "[2007, 2008]"}
    with judge(lambda text, _: found[mathvista_prediction(text)]) as stand_in:
        conclusions = ["(B)", "neither", "14", "about seven", "1.45 m", "2007, 2008"]
        scores = scored("mathvista", tmp_path, conclusions, stand_in)
        assert len(stand_in.texts) == 4
    table = {row["Task&Skill"]: (row["tot"], row["prefetch"], row["hit"]) for row in scores["tables"]["accuracy"]}
    assert table == {
        "Overall": (6, 2, 3),
        "figure question answering": (2, 1, 1),
        "geometry problem solving": (1, 0, 0),
        "math word problem": (3, 1, 2),
        "statistical reasoning": (2, 1, 1),
        "arithmetic reasoning": (4, 2, 3),
        "geometry reasoning": (1, 0, 0),
        "numeric commonsense": (1, 0, 1),
    }
    assert scores["tables"]["accuracy"][0]["acc"] == 50
    assert (scores["judge_requests"]["asked"], scores["judge_requests"]["unread"]) == (4, 2)


@pytest.mark.slow
def test_options_that_a_judge_chooses(tmp_path):
    """The kit asks three times for an option, and then takes one by chance: it is counted, and the same next time."""
    nonsense = iter("PQR")
    with judge(lambda text, _: next(nonsense) if "third" in text else "B") as stand_in:
        conclusions = ["A", "the second, I think, and not the third", "B"]
        scores = scored("ai2d", tmp_path, ["B", *conclusions[1:2], "A"], stand_in)
        replies = [json.loads(line)["reply"] for line in (tmp_path / "judge_replies.jsonl").open()]
        assert [reply["choices"][0]["message"]["content"] for reply in replies] == ["P", "Q", "R"]
        assert scores["judge_requests"] == {"requests": 3, "kept": 0, "retries": 0, "asked": 1, "unread": 1}
        again = scored("ai2d", tmp_path, ["B", *conclusions[1:2], "A"], stand_in)
        assert len(stand_in.texts) == 3
    assert again["tables"] == scores["tables"]


@pytest.mark.slow
def test_requests_that_do_not_reach_the_relay(tmp_path, monkeypatch):
    """The kit would take an option by chance: there is no score."""
    monkeypatch.setattr(kit_scores, "_PASSED_ON", (*kit_scores._PASSED_ON, "http_proxy"))
    with judge(lambda *_: "B") as stand_in:
        with pytest.raises(UserError, match="made 3 requests to the judge, of which 0 reached it"):
            scored("ai2d", tmp_path, ["B", "the second, I think, and not the third", "A"], stand_in)
        assert not stand_in.bodies
    assert not (tmp_path / "vlmevalkit" / "scored").exists()


@pytest.mark.slow
def test_hallusionbench_with_a_judge(tmp_path):
    with judge(lambda text, _: "Yes" if "rising" in text.rpartition("Question")[2] else "Unknown") as stand_in:
        conclusions = ["Yes", "No", "No", "Yes", "It is rising", "No", "Who can say"]
        scores = scored("hallusionbench", tmp_path, conclusions, stand_in)
    assert scores["tables"]["accuracy"][0]["aAcc"] == pytest.approx(600 / 7)
    assert scores["judge_requests"] == {"requests": 6, "kept": 0, "retries": 0, "asked": 2, "unread": 1}


@pytest.mark.slow
def test_a_judge_that_stops_answering_leaves_no_score_and_can_go_on(tmp_path):
    """The scoring ends with one line; the grades that came before are kept, and only the others are asked for later."""
    with judge(lambda text, before: 500 if "pug" in mmvet_row(text)[1] else grade(text, before)) as stand_in:
        with pytest.raises(
            TransientError, match=r"does not answer \(HTTP status 500\): run the same command again"
        ) as end:
            scored("mmvet", tmp_path, MMVET, stand_in)
        assert "\n" not in str(end.value) and KEY not in str(end.value)
        assert not (tmp_path / "vlmevalkit" / "scored").exists()
        kept = len((tmp_path / "judge_replies.jsonl").read_text().splitlines())
        # A process that was killed leaves half a line.
        with (tmp_path / "judge_replies.jsonl").open("a") as file:
            file.write('{"digest": "ab')
        stand_in.reply = grade
        asked = len(stand_in.texts)
        scores = scored("mmvet", tmp_path, MMVET, stand_in)
        assert len(stand_in.texts) == asked + 4 - kept
    assert scores["tables"]["capabilities"][-1]["acc"] == 50


def test_the_waits_of_a_judge():
    """Each further wait is as long as the endpoint asks for, or longer than the last; at the end it has failed."""
    headers = iter(["7", "", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 400))])
    waits = []
    with judge(lambda *_: (429, {"Retry-After": next(headers, "")})) as stand_in:
        grader = Grader.from_options(f"{stand_in.url}/chat/completions?api-version=3", "j")
        with pytest.raises(TransientError, match=rf"judge j at {stand_in.url}/chat/completions does not answer \(HTTP"):
            grader.ask({"messages": [{"role": "user", "content": "1?"}]}, wait=waits.append)
    assert waits[:2] == [7, 0.01] and 390 < waits[2] < 401 and waits[3:] == [0.01] * 4
    assert len(stand_in.bodies) == 8 == len(waits) + 1


def test_the_waits_grow():
    assert all(later == 2 * earlier for earlier, later in pairwise(WAITS)) and sum(WAITS) > 60


WAITS = grader_module._WAITS
"""Waits as they are outside of tests."""


def test_a_judge_without_a_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with judge(lambda *_: "yes") as stand_in:
        Grader.from_options(stand_in.url, "j").check()
    assert stand_in.keys == {None} and stand_in.bodies[0]["model"] == "j"


@pytest.mark.parametrize("key", [f"{KEY}\nmore", f"{KEY}…"])
def test_a_key_that_no_request_can_have(monkeypatch, key):
    """It is refused at once: the library that sends it would show it in its error."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="the variable OPENAI_API_KEY has a character that no key has") as told:
        Grader.from_options("http://localhost/v1", "j")
    assert KEY not in str(told.value)


def test_a_wait_that_is_too_long():
    with (
        judge(lambda *_: (503, {"Retry-After": "3600"})) as stand_in,
        pytest.raises(TransientError, match="HTTP status 503"),
    ):
        Grader.from_options(stand_in.url, "j").ask({"messages": [{"role": "user", "content": "1?"}]})
    assert len(stand_in.bodies) == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses the key (HTTP status 401): put it in the variable OPENAI_API_KEY"), (400, 'status 400): {"error"')],
)
def test_a_request_that_is_refused_is_not_made_again(status, message):
    with judge(lambda *_: status) as stand_in, pytest.raises(UserError) as told:
        Grader.from_options(stand_in.url, "j").ask({"messages": [{"role": "user", "content": "1?"}]})
    assert message in str(told.value) and len(stand_in.bodies) == 1


def test_a_judge_that_is_too_slow_or_not_there(monkeypatch):
    monkeypatch.setattr(grader_module, "_TIMEOUT", (1.0, 0.05))
    with judge(lambda *_: time.sleep(0.3)) as stand_in:
        grader = Grader.from_options(stand_in.url, "j")
        with pytest.raises(TransientError, match="no answer in time"):
            grader.ask({"messages": [{"role": "user", "content": "1?"}]}, tries=2)
    with pytest.raises(TransientError, match="ConnectionError"):
        grader.check()


@pytest.mark.parametrize(
    ("url", "model", "message"),
    [
        ("http://localhost/v1", None, "--grader.url needs --grader.model"),
        (None, "j", "--grader.model needs --grader.url"),
        ("localhost:8000", "j", "grader.url is 'localhost:8000'; it must be an address"),
        ("https://me:secret@localhost/v1", "j", "put the key in the environment variable OPENAI_API_KEY"),
        ("me:secret@localhost/v1", "j", "put the key in the environment variable OPENAI_API_KEY"),
        ("http://[localhost/v1", "j", "grader.url is 'http://[localhost/v1'; it must be an address"),
        ("http://localhost:99999/v1", "j", "it must be an address"),
    ],
)
def test_a_judge_that_cannot_be_used(url, model, message):
    with pytest.raises(UserError) as told:
        Grader.from_options(url, model)
    assert message in str(told.value) and "secret" not in str(told.value)
    assert Grader.from_options(None, None) is None
