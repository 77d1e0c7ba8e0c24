"""The command that makes training data, against a stand-in endpoint."""

import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_cot_jax import annotate
from llava_cot_jax.annotation import endpoint
from llava_cot_jax.data.raw.annotations import read_annotations
from llava_cot_jax.data.raw.images import open_images
from llava_cot_jax.errors import TransientError, UserError
from tests.annotation.stand_in_endpoint import Asked, Response, StandIn, running, staged, well
from tests.processes import ROOT

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-offs are short, and there is a key."""
    monkeypatch.setattr(endpoint, "_FIRST_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with running() as endpoint_:
        yield endpoint_


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "image": "a.png", "question": f"Which is q{i}?", "answer": f"thing {i}"} for i in range(count)]


def write_input(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Write the rows and an image. Return the options that name them."""
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (20, 10), "red").save(folder / "images" / "a.png")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"input": "questions.jsonl", "images": "images", "output": "out.jsonl"}
    return [f"--{name}={folder / path}" for name, path in named.items()]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder: Path, rows: list[dict[str, Any]], stand_in: StandIn, *options: str) -> None:
    annotate.main([*write_input(folder, rows), "--model", "stand-in", "--base_url", stand_in.url, *options])


def by_question(behaviours: dict[str, list[Response]], kind: str = "answer") -> Callable[[Asked], Response]:
    """Responses to the requests about a question in turn, and good ones after them and to all others."""
    left = {question: list(responses) for question, responses in behaviours.items()}

    def behave(asked: Asked) -> Response:
        waiting = left.get(asked.question, [])
        return waiting.pop(0) if waiting and asked.is_check == (kind == "check") else well(asked)

    return behave


def test_good_answers_become_rows_that_prepare_reads(tmp_path, stand_in, capsys):
    rows = rows_of(3)
    rows[1] |= {"image": None, "images": ["a.png", "a.png"], "hint": "it is small"}
    rows[2] = {"id": "t", "question": "Which is text?", "answer": ["4", 5]}
    run(tmp_path, rows, stand_in)
    annotated = lines(tmp_path / "out.jsonl")
    answers = ["thing 0", "thing 1", "4 or 5"]  # the stand-in gives back what it is told
    assert annotated == [
        {
            "id": row["id"],
            **({"image": row.get("image") or row["images"]} if "image" in row else {}),
            "conversations": [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": staged(answer)}],
        }
        for row, answer in zip(rows, answers, strict=True)
    ]
    assert not lines(tmp_path / "out.rejected.jsonl")
    read = read_annotations(tmp_path / "out.jsonl", open_images(tmp_path / "images"))
    assert [row.unstaged for row in read.entries] == [0, 0, 0] and not read.skipped
    by_id = {asked.question: asked for asked in stand_in.asked if not asked.is_check}
    _, user = by_id["Which is q1?"].body["messages"]
    assert [part["type"] for part in user["content"]] == ["image_url", "image_url", "text"]
    encoded = user["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(encoded) == (tmp_path / "images" / "a.png").read_bytes()
    assert "Hint: it is small" in user["content"][2]["text"]
    assert isinstance(by_id["Which is text?"].body["messages"][1]["content"], str)
    assert "Hint" not in by_id["Which is q0?"].body["messages"][1]["content"][1]["text"]
    out = capsys.readouterr().out
    assert "3 turns to ask stand-in about, in 3 requests at least and 12 at most" in out
    assert "turns kept: 3, in 3 rows; rejected: 0 (0.0%)" in out


BAD = {
    "missing section": Response(staged("x").replace("<CAPTION>", "").replace("</CAPTION>", "")),
    "wrong order": Response("\n".join(staged("x").split("\n\n")[::-1])),
    "text outside": Response("Sure!\n" + staged("x")),
    "section not closed": Response(staged("x").replace("</REASONING>", "")),
    "repeated tag": Response(staged("x") + "\n<CONCLUSION> y </CONCLUSION>"),
    "empty section": Response(staged("x", REASONING=" ")),
    "cut off": Response(staged("x"), finish="length"),
    "unusable characters": Response(staged("x\ud83d")),
    "refusal": Response("", refusal="I cannot help with that"),
    "wrong conclusion": Response(staged("another thing")),
}


def test_each_bad_answer_is_told_and_mended_or_rejected(tmp_path, stand_in, capsys):
    rows = rows_of(2 * len(BAD))
    questions = [row["question"] for row in rows]
    once = {question: [response] for question, response in zip(questions, BAD.values(), strict=False)}
    twice = {question: [response] * 2 for question, response in zip(questions[len(BAD) :], BAD.values(), strict=True)}
    stand_in.behave = by_question(once | twice)
    run(tmp_path, rows, stand_in)
    annotated, rejected = lines(tmp_path / "out.jsonl"), lines(tmp_path / "out.rejected.jsonl")
    assert [row["id"] for row in annotated] == list(range(len(BAD)))
    assert [row["conversations"][1]["value"] for row in annotated] == [staged(f"thing {i}") for i in range(len(BAD))]
    assert [row["reason"] for row in rejected] == list(BAD)
    assert all([each["reason"] for each in row["tries"]] == [row["reason"]] * 2 for row in rejected)
    assert rejected[0]["detail"] == "the section <CAPTION> is missing"
    again = [asked for asked in stand_in.asked if asked.attempt == 2 and not asked.is_check]
    assert len(again) == 2 * len(BAD)
    for asked in again:
        _, _, replied, told = asked.body["messages"]
        index = questions.index(asked.question) % len(BAD)
        bad = list(BAD.values())[index]
        assert replied == {"role": "assistant", "content": bad.refusal or bad.text.replace("\ud83d", "?")}
        assert rejected[index]["detail"] in told["content"] or index == len(BAD) - 1
    out = capsys.readouterr().out
    assert f"turns kept: {len(BAD)}, in {len(BAD)} rows; rejected: {len(BAD)} (50.0%)" in out
    counted = re.search("reasons of all tries that were not kept: (.*)", out)[1]
    assert sorted(counted.split(", ")) == sorted(f"{kind} 3" for kind in BAD)


def test_the_meaning_is_asked_about_unless_the_text_is_the_same(tmp_path, stand_in):
    conclusions = ["**Thing 0**.", "the zeroth thing", "I would rather not say", "maybe", "no idea"]
    verdicts = ["", "Yes.", "refusal", "perhaps", "**No**: it is vague"]
    rows = rows_of(len(conclusions))
    for row in rows:
        row["answer"] = "thing 0"
    said = {row["question"]: pair for row, pair in zip(rows, zip(conclusions, verdicts, strict=True), strict=True)}

    def behave(asked: Asked) -> Response:
        conclusion, verdict = said[asked.question]
        return Response(verdict if asked.is_check else staged(conclusion))

    stand_in.behave = behave
    run(tmp_path, rows, stand_in, "--tries", "1")
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 1]
    reasons = {row["id"]: (row["reason"], row["detail"]) for row in lines(tmp_path / "out.rejected.jsonl")}
    assert [reasons[i][0] for i in (2, 3, 4)] == ["refusal", "unreadable verdict", "wrong conclusion"]
    assert reasons[4][1].endswith("(it is vague)")
    checks = [asked for asked in stand_in.asked if asked.is_check]
    assert sorted(asked.question for asked in checks) == [f"Which is q{i}?" for i in range(1, 5)]
    assert all(len(asked.body["messages"]) == 1 and asked.standard_answer == "thing 0" for asked in checks)


def test_later_turns_follow_the_dialogue_without_turns_that_were_rejected(tmp_path, stand_in):
    row = {
        "id": "m",
        "image": "a.png",
        "questions": ["<image>\nFirst?", "Second?", "Third?"],
        "answers": ["one", "two", 3],
        "hints": [None, "a pair", None],
    }
    stand_in.behave = by_question({"Second?": [Response("no sections")] * 2})
    run(tmp_path, [row], stand_in)
    (annotated,) = lines(tmp_path / "out.jsonl")
    assert [turn["value"] for turn in annotated["conversations"]] == [
        "<image>\nFirst?",
        staged("one"),
        "Third?",
        staged("3"),
    ]
    (rejected,) = lines(tmp_path / "out.rejected.jsonl")
    assert (rejected["turn"], rejected["question"], rejected["answer"]) == (2, "Second?", "two")
    _, user, answer, last = stand_in.asked[-1].body["messages"]
    assert user["content"][0]["type"] == "image_url" and user["content"][1] == {"type": "text", "text": "First?"}
    assert (answer["content"], stand_in.asked[-1].question) == (staged("one"), "Third?")
    assert isinstance(last["content"], str)


def test_failures_of_the_endpoint_are_counted_and_mended(tmp_path, stand_in, capsys):
    rows = rows_of(8)
    troubles = [
        Response("slow down", status=429, headers={"Retry-After": "0.3"}),
        Response("broken", status=500),
        Response("gone", status=503),
        Response(staged("thing 3"), breaks=True),
        Response(staged("thing 4"), cut=True),
        Response(staged("thing 5"), late=3),
        Response("not now", status=429, headers={"retry-after-ms": "20"}),
    ]
    questions = [row["question"] for row in rows]
    stand_in.behave = by_question({q: [trouble] for q, trouble in zip(questions, troubles, strict=False)})
    run(tmp_path, rows, stand_in, "--timeout", "1.5", "--requests_in_flight", "8")
    answers = [row["conversations"][1]["value"] for row in lines(tmp_path / "out.jsonl")]
    assert answers == [staged(f"thing {i}") for i in range(8)]
    out = capsys.readouterr().out
    assert sorted(re.search("requests that failed: (.*)", out)[1].split(", ")) == [
        "broken connection 1",
        "no reply in time 1",
        "status 429 2",
        "status 500 1",
        "status 503 1",
        "unreadable reply 1",
    ]
    first, second = [asked.time for asked in stand_in.asked if asked.question == questions[0]]
    assert second - first >= 0.3
    assert len(stand_in.asked) == 8 + 7


def test_requests_that_are_too_many_stand_in_a_queue(tmp_path, stand_in):
    """Two of three requests are refused. However often one is, it is sent again as long as others come through."""
    refused = Response("too many", status=429, headers={"retry-after-ms": "5"})
    stand_in.behave = lambda asked: refused if asked.number % 3 else well(asked)
    run(tmp_path, rows_of(30), stand_in, "--max_retries", "2", "--requests_in_flight", "8")
    assert len(lines(tmp_path / "out.jsonl")) == 30
    assert 88 <= len(stand_in.asked) <= 90


def test_a_delay_that_is_too_long_to_wait_for_ends_the_run(tmp_path, stand_in, capsys):
    rows = rows_of(3)
    tomorrow = {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}
    stand_in.behave = by_question({rows[1]["question"]: [Response("used up", status=429, headers=tomorrow)]})
    run(tmp_path, rows, stand_in, "--requests_in_flight", "1")
    assert "2 of 3 rows are not finished (the endpoint asks to wait for" in capsys.readouterr().err
    run(tmp_path, rows, stand_in)
    assert len(lines(tmp_path / "out.jsonl")) == 3 and len(stand_in.asked) == 4


def test_a_request_that_always_fails_is_left_for_the_next_run(tmp_path, stand_in, capsys):
    rows = rows_of(3)
    stand_in.behave = by_question({rows[1]["question"]: [Response("broken", status=500)] * 3})
    run(tmp_path, rows, stand_in, "--max_retries", "2", "--requests_in_flight", "3")
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 2]
    assert not lines(tmp_path / "out.rejected.jsonl")
    assert "1 of 3 rows are not finished (1 by status 500)" in capsys.readouterr().err
    asked = len(stand_in.asked)
    run(tmp_path, rows, stand_in)
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 1, 2]
    assert len(stand_in.asked) == asked + 1


REFUSED = {
    401: r"does not accept the key \(status 401\): check the environment",
    403: r"answers with status 403: no access with \[key\]",
    404: "answers with status 404: no access",
    400: "the first 4 requests were refused; of the last one, the endpoint refuses it with status 400: no access",
}


@pytest.mark.parametrize("status", REFUSED)
def test_what_no_other_try_can_mend_ends_the_command(tmp_path, stand_in, status):
    stand_in.behave = lambda asked: Response(f"no access with {KEY}", status=status)
    with pytest.raises(UserError, match=REFUSED[status]) as ended:
        run(tmp_path, rows_of(8), stand_in, "--requests_in_flight", "1")
    assert KEY not in str(ended.value)
    assert len(stand_in.asked) == (4 if status == 400 else 1)


def test_an_endpoint_that_is_not_there(tmp_path):
    options = [*write_input(tmp_path, rows_of(1)), "--model=x", "--base_url=http://127.0.0.1:9/v1", "--max_retries=1"]
    with pytest.raises(TransientError, match=r"127\.0\.0\.1:9/v1/ answers nothing"):
        annotate.main(options)


def test_a_refused_request_is_rejected_with_the_reason(tmp_path, stand_in):
    rows = rows_of(2)
    stand_in.behave = by_question({rows[0]["question"]: [Response("against the policy", status=400)]})
    run(tmp_path, rows, stand_in, "--requests_in_flight", "1")
    (rejected,) = lines(tmp_path / "out.rejected.jsonl")
    assert (rejected["id"], rejected["reason"]) == (0, "refused request")
    assert rejected["detail"] == "the endpoint refuses it with status 400: against the policy"


def test_images_that_are_missing_or_damaged_are_rejected_unasked(tmp_path, stand_in):
    rows = rows_of(3)
    rows[0]["image"], rows[1]["image"] = "no.png", "half.png"
    options = write_input(tmp_path, rows)
    noise = Image.effect_noise((64, 64), 90)
    noise.save(tmp_path / "images" / "half.png")
    content = (tmp_path / "images" / "half.png").read_bytes()
    (tmp_path / "images" / "half.png").write_bytes(content[: len(content) // 2])
    annotate.main([*options, "--model", "x", "--base_url", stand_in.url])
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [2]
    first, second = lines(tmp_path / "out.rejected.jsonl")
    assert first["reason"] == second["reason"] == "unusable image"
    assert "there is no no.png" in first["detail"] and len(stand_in.asked) == 1


OUTSIDE = ["../secret.png", "/etc/hostname.png", "images/../../secret.png", "link.png", "linked/secret.png"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_of_images_cannot_leave_the_folder(tmp_path, stand_in, path):
    options = write_input(tmp_path, [*rows_of(1), {"id": "x", "image": path, "question": "q?", "answer": "a"}])
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "linked").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"questions.jsonl, line 2: image '.*' leads out of .*/images"):
        annotate.main([*options, "--model", "x", "--base_url", stand_in.url])
    assert not stand_in.asked


def test_an_image_that_two_folders_may_mean_is_not_asked_about(tmp_path, stand_in):
    """As ``prepare`` would skip the rows."""
    rows = rows_of(3)
    rows[0]["image"], rows[1]["image"] = "coco/a.png", "vg/a.png"
    run(tmp_path, rows, stand_in)
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [2]
    rejected = lines(tmp_path / "out.rejected.jsonl")
    assert all("rows with another folder" in row["detail"] for row in rejected) and len(rejected) == 2


def test_paths_of_images_cannot_leave_a_zip(tmp_path, stand_in):
    rows = rows_of(1)
    options = write_input(tmp_path, rows)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "images" / "a.png", "a.png")
    options[1] = f"--images={tmp_path / 'images.zip'}"
    annotate.main([*options, "--model", "x", "--base_url", stand_in.url])
    assert len(lines(tmp_path / "out.jsonl")) == 1
    (tmp_path / "questions.jsonl").write_text(json.dumps(rows[0] | {"image": "../secret.png"}))
    with pytest.raises(UserError, match="leads out of"):
        annotate.main([*options, "--model", "x", "--base_url", stand_in.url])


def test_large_and_turned_images_are_sent_upright_and_shrunk(tmp_path, stand_in):
    rows = [{"id": 1, "images": ["big.jpg", "a.bmp"], "question": "q?", "answer": "a"}]
    options = write_input(tmp_path, rows)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (300, 100), "blue").save(tmp_path / "images" / "big.jpg", exif=exif)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "images" / "a.bmp")
    annotate.main([*options, "--model", "x", "--base_url", stand_in.url, "--max_side", "90"])
    photo, drawing, _ = stand_in.asked[0].body["messages"][1]["content"]
    sent = [part["image_url"]["url"].split(";base64,") for part in (photo, drawing)]
    opened = [Image.open(io.BytesIO(base64.b64decode(content))) for _, content in sent]
    assert [media for media, _ in sent] == ["data:image/jpeg", "data:image/png"]
    assert [image.size for image in opened] == [(30, 90), (8, 8)]


def test_the_number_of_requests_is_bounded_over_all_runs(tmp_path, stand_in, capsys):
    rows = rows_of(6)
    run(tmp_path, rows, stand_in, "--max_requests", "4", "--requests_in_flight", "3")
    assert len(stand_in.asked) == 4 and len(lines(tmp_path / "out.jsonl")) == 4
    assert "2 of 6 rows are not finished (--max_requests 4 is reached)" in capsys.readouterr().err
    run(tmp_path, rows, stand_in, "--max_requests", "4")
    assert len(stand_in.asked) == 4
    run(tmp_path, rows, stand_in, "--max_requests", "6")
    assert len(stand_in.asked) == 6 and len(lines(tmp_path / "out.jsonl")) == 6
    run(tmp_path, rows, stand_in)
    assert len(stand_in.asked) == len({asked.digest for asked in stand_in.asked}) == 6


def test_the_cost_is_bounded(tmp_path, stand_in, capsys):
    """A reply costs 1000 tokens in and 200 out: 0.0014. One in flight may cost up to some 0.002 + 300 tokens out."""
    prices = ["--price.input", "1", "--price.output", "2", "--max_new_tokens", "300"]
    run(tmp_path, rows_of(9), stand_in, *prices, "--max_cost", "0.01", "--requests_in_flight", "9")
    out, err = capsys.readouterr()
    spent = float(re.search(r"out: [\d,]+, cost ([\d.]+)", out)[1])
    assert spent == pytest.approx(0.0014 * len(stand_in.asked), rel=1e-3)
    assert 0.01 - 0.0028 <= spent <= 0.01
    assert "which cost about" in out and "rows are not finished (--max_cost 0.01 leaves no room" in err
    stand_in.behave = lambda asked: Response(staged(asked.standard_answer), usage=False)
    with pytest.raises(UserError, match="does not say how many tokens"):
        run(tmp_path, rows_of(9), stand_in, *prices, "--max_cost", "1")
    with pytest.raises(UserError, match=r"a cost needs --price\.input and --price\.output"):
        run(tmp_path, rows_of(9), stand_in, "--max_cost", "1")


def test_requests_are_bounded_in_flight_and_per_minute(tmp_path, stand_in):
    stand_in.behave = lambda asked: Response(staged(asked.standard_answer), late=0.05)
    run(tmp_path, rows_of(12), stand_in, "--requests_in_flight", "3")
    assert 2 <= stand_in.most <= 3
    (tmp_path / "paced").mkdir()
    stand_in.asked.clear()
    run(tmp_path / "paced", rows_of(6), stand_in, "--requests_per_minute", "1200")
    times = [asked.time for asked in stand_in.asked]
    assert times[-1] - times[0] >= 0.9 * 5 * 60 / 1200  # the first comes some milliseconds late


def test_settings_of_replies_are_sent_and_other_ones_ask_anew(tmp_path, stand_in):
    run(tmp_path, rows_of(1), stand_in)
    run(tmp_path, rows_of(1), stand_in, "--temperature", "0.5", "--max_new_tokens", "77")
    first, second = (asked.body for asked in stand_in.asked)
    assert "temperature" not in first and first["max_completion_tokens"] == 2048
    assert (second["temperature"], second["max_completion_tokens"]) == (0.5, 77)
    prompts = (ROOT / "llava_cot_jax/annotation/prompts.yaml").read_text().replace("You write worked", "Write worked")
    (tmp_path / "mine.yaml").write_text(prompts)
    run(tmp_path, rows_of(1), stand_in, "--prompts", str(tmp_path / "mine.yaml"))
    assert stand_in.asked[2].body["messages"][0]["content"].startswith("Write worked answers")


def test_the_key_is_sent_and_nowhere_else(tmp_path, monkeypatch, capsys):
    def behave(asked: Asked) -> Response:
        if asked.question == "Which is q1?":
            return Response(f"bad request of {KEY}", status=400)
        return Response(staged(f"{asked.standard_answer}", CAPTION=f"it says {KEY}"))

    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY")
    with running(behave) as stand_in:
        run(tmp_path, rows_of(3), stand_in, "--key_variable", "MY_KEY")
        assert stand_in.keys == {f"Bearer {KEY}"}
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert KEY.encode() not in written and b"[key]" in written
        assert KEY not in "".join(capsys.readouterr())
        stand_in.keys.clear()
        run(tmp_path, rows_of(4), stand_in)  # an endpoint that is named needs no key
        assert stand_in.keys == {"Bearer none"}


def test_wrong_arguments(tmp_path, monkeypatch):
    def refuses(message: str, rows: list[dict[str, Any]], *options: str) -> None:
        given = write_input(tmp_path, rows)
        with pytest.raises(UserError, match=message):
            annotate.main([*given, "--model=x", "--base_url=http://localhost:1/v1", *options])

    good = rows_of(1)
    refuses("base_url has a name, a password or a query", good, "--base_url=http://me:sk-1@localhost/v1")
    refuses("base_url is no URL of an endpoint", good, "--base_url=localhost:8000")
    refuses("--seed has a meaning only with --model self", good, "--seed=3")
    refuses("--checkpoint has a meaning only with --model self", good, "--checkpoint=shapes")
    refuses(
        "--max_requests has no meaning with --model self", good, "--base_url=null", "--model=self", "--max_requests=3"
    )
    refuses("tries is 0; it must be at least 1", good, "--tries=0")
    refuses("timeout is 0; it must be more than 0", good, "--timeout=0")
    refuses("--output is the file of the questions", good, f"--output={tmp_path}/questions.jsonl")
    refuses("its name must end in .jsonl", good, f"--output={tmp_path}/out")
    refuses("a cost needs --price.input and --price.output", good, "--price.input=1")
    refuses(r"line 1: it has the key 'answr'", [good[0] | {"answr": 1}])
    refuses(r"line 2 has the id 0 of an earlier line", [*good, *good])
    refuses(r"line 1: a question has no standard answer", [{"id": 1, "question": "q?"}])
    refuses(r"line 1: it has 2 questions, 1 answers and 2 hints", [{"id": 1, "questions": ["a", "b"], "answers": [1]}])
    refuses(r"line 1: a question spells the control token", [good[0] | {"question": "<|eot_id|>?"}])
    refuses("no row has its image in", [good[0] | {"image": "b.png"}])
    (tmp_path / "prompts.yaml").write_text("ask: hello\n")
    refuses("prompts.yaml: system is None", good, f"--prompts={tmp_path}/prompts.yaml")
    (tmp_path / "other.jsonl").write_text("{}\n")
    refuses("other.jsonl exists, but other.journal.jsonl", good, f"--output={tmp_path}/other.jsonl")
    (tmp_path / "bad.journal.jsonl").write_text("{}\n")
    refuses("bad.journal.jsonl, line 1 is no reply of this command", good, f"--output={tmp_path}/bad.jsonl")
    monkeypatch.delenv("OPENAI_API_KEY")
    refuses("the environment variable OPENAI_API_KEY has no key", good, "--base_url=null")


def test_without_the_openai_package(tmp_path):
    """The package is missed before any file is looked for."""
    code = "import sys; sys.modules['openai'] = None; from llava_cot_jax import annotate, cli; cli.run(annotate.main)"
    options = ["--input=no.jsonl", "--images=no", "--output=out.jsonl", "--model=gpt-4o"]
    ended = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "error: an endpoint is asked through the package openai: pip install 'llava-cot-jax[annotate]'\n"
    )


def command(folder: Path, rows: list[dict[str, Any]], stand_in: StandIn, *options: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    given = [*write_input(folder, rows), "--model", "stand-in", "--base_url", stand_in.url, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "llava_cot_jax.annotate", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_killed_ten_times_and_nothing_is_asked_twice(tmp_path):
    rows = rows_of(60)
    bad = {row["question"]: [list(BAD.values())[i % len(BAD)]] for i, row in enumerate(rows[::4])}

    def behave(asked: Asked) -> Response:
        """A response that depends on the request alone, so that it is the same after a restart."""
        if asked.is_check or asked.attempt > 1 or asked.question not in bad:
            return well(asked)
        return bad[asked.question][0]

    (tmp_path / "whole").mkdir()
    with running(behave) as stand_in:
        run(tmp_path / "whole", rows, stand_in)
    draw = random.Random(0)
    phases = ["before", "half", "after"]
    processes: list[subprocess.Popen[str]] = []
    again: list[Asked] = []
    finished: set[str] = set()  # requests whose replies were in the journal when the command was killed
    with running() as stand_in:

        def kill() -> None:
            processes[-1].send_signal(signal.SIGKILL)
            processes[-1].wait()

        def behave_until_killed(asked: Asked) -> Response:
            if asked.digest in finished:
                again.append(asked)
            response = behave(asked)
            if asked.number != last:
                return response
            return Response(response.text, response.finish, refusal=response.refusal, **{draw.choice(phases): kill})

        stand_in.behave = behave_until_killed
        for kills in range(11):
            last = len(stand_in.asked) + draw.randint(1, 7) if kills < 10 else -1
            processes.append(command(tmp_path, rows, stand_in, "--requests_in_flight", "4"))
            _, err = processes[-1].communicate(timeout=120)
            assert processes[-1].returncode == (-signal.SIGKILL if kills < 10 else 0), err
            kept = [line for line in (tmp_path / "out.journal.jsonl").read_text().split("\n")[:-1]]
            numbers = [int(json.loads(line)["reply"]["completion"].removeprefix("completion-")) for line in kept]
            finished |= {stand_in.asked[number - 1].digest for number in numbers}
            assert len(set(numbers)) == len(numbers)
        digests = [asked.digest for asked in stand_in.asked]
    for name in ("out.jsonl", "out.rejected.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not again and set(digests) == finished
    assert len(digests) - len(finished) <= 10 * 4  # those in flight when it was killed


def test_ctrl_c_keeps_the_replies_in_flight(tmp_path):
    rows = rows_of(12)
    processes: list[subprocess.Popen[str]] = []

    def behave(asked: Asked) -> Response:
        if asked.number == 5:
            processes[-1].send_signal(signal.SIGINT)
        return Response(well(asked).text, late=0.3 if asked.number >= 4 else 0)

    with running(behave) as stand_in:
        processes.append(command(tmp_path, rows, stand_in, "--requests_in_flight", "3"))
        _, err = processes[-1].communicate(timeout=60)
        journal = tmp_path / "out.journal.jsonl"
        assert processes[-1].returncode == 130
        assert err.splitlines()[-2:] == [
            f"all replies so far are in {journal}: the same command goes on",
            "interrupted",
        ]
        assert len(lines(journal)) == len(stand_in.asked) < 12
        run(tmp_path, rows, stand_in)
        assert len(stand_in.asked) == len({asked.digest for asked in stand_in.asked}) == 12
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == list(range(12))


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    with running(lambda asked: Response(late=20)) as stand_in:
        process = command(tmp_path, rows_of(4), stand_in, "--requests_in_flight", "2")
        while not stand_in.asked:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "the replies to those in flight are awaited" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=15)
        assert process.returncode == 130 and err.splitlines()[-1] == "interrupted"


def test_a_torn_line_of_the_journal_is_asked_again_and_two_commands_do_not_share_one(tmp_path, stand_in):
    run(tmp_path, rows_of(3), stand_in)
    whole = (tmp_path / "out.jsonl").read_bytes()
    journal = tmp_path / "out.journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    run(tmp_path, rows_of(3), stand_in)
    assert (tmp_path / "out.jsonl").read_bytes() == whole and len(stand_in.asked) == 4

    def behave(asked: Asked) -> Response:
        ended = subprocess.run(
            [sys.executable, "-m", "llava_cot_jax.annotate", *options], capture_output=True, text=True, cwd=ROOT
        )
        assert ended.returncode == 2 and "is being written by another process" in ended.stderr
        return well(asked)

    options = [*write_input(tmp_path, rows_of(4)), "--model", "stand-in", "--base_url", stand_in.url]
    stand_in.behave = behave
    run(tmp_path, rows_of(4), stand_in)
    assert len(lines(tmp_path / "out.jsonl")) == 4
