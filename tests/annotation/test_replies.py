"""Replies of an endpoint become rows, or are told what is wrong, and images are sent as they should be."""

import base64
import io
import json
import os
import re
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from llava_cot_jax import annotate
from llava_cot_jax.annotation import sent_images
from llava_cot_jax.annotation.sent_images import image_url, reading_images
from llava_cot_jax.data.raw.annotations import read_annotations
from llava_cot_jax.data.raw.images import open_images
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.images import MAX_PIXELS_TO_SHRINK, open_image
from tests.annotation.runs import BAD, by_question, lines, rows_of, run, write_input
from tests.annotation.stand_in_endpoint import Asked, Response, staged


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
    assert "3 turns to ask stand-in about, in 3 requests at least and 18 at most" in out
    assert "turns kept: 3, in 3 rows; rejected: 0 (0.0%)" in out


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
    assert sorted(asked.question for asked in checks) == [f"Which is q{i}?" for i in (1, 2, 3, 3, 4)]  # q3 once more
    assert all(len(asked.body["messages"]) == 1 and asked.standard_answer == "thing 0" for asked in checks)


def test_the_whole_answer_of_our_own_server_is_taken_and_its_verdict_is_the_conclusion(tmp_path, stand_in):
    stand_in.behave = lambda asked: (
        Response("yes", whole=staged("yes", SUMMARY="compare")) if asked.is_check else Response("x", whole=staged("x"))
    )
    run(tmp_path, rows_of(1), stand_in)
    (row,) = lines(tmp_path / "out.jsonl")
    assert row["conversations"][1]["value"] == staged("x")


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


@pytest.mark.slow
def test_images_that_pillow_refuses_are_unusable_and_large_ones_are_shrunk(monkeypatch):
    """An image of more than twice as many pixels as Pillow opens by itself is shrunk; any error is of the image."""
    written = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(written, "PNG")
    with reading_images():
        sent = image_url(written.getvalue(), 100)
        assert Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2]))).size == (100, 50)
        monkeypatch.setattr(Image.Image, "save", lambda *_, **__: 1 / 0)
        with pytest.raises(UserError, match="cannot be sent: division by zero"):
            image_url(written.getvalue(), 100)


def test_images_are_shrunk_side_by_side_under_one_limit_of_pillow(tmp_path, stand_in, monkeypatch):
    """The number of pixels that Pillow opens holds for all threads: none may change it while another reads."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before, together, limits = Image.MAX_IMAGE_PIXELS, threading.Barrier(2, timeout=60), set()

    def noting(content: bytes, max_side: int) -> str:
        together.wait()  # for another thread that does the same
        sent = image_url(content, max_side)
        limits.add(Image.MAX_IMAGE_PIXELS)
        return sent

    monkeypatch.setattr(sent_images, "image_url", noting)
    run(tmp_path, rows_of(12), stand_in, "--requests_in_flight", "12")
    assert len(stand_in.asked) == 12
    assert limits == {MAX_PIXELS_TO_SHRINK} and before == Image.MAX_IMAGE_PIXELS


def test_images_that_others_would_show_differently_are_sent_as_the_model_sees_them(tmp_path):
    """Transparency is on white, 12 bits are scaled, and of an animation there is the first picture."""
    clear, deep = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("I;16", (8, 8), 3000)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    clear.save(tmp_path / "clear.png")
    deep.save(tmp_path / "deep.png")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with reading_images():
        for path in sorted(tmp_path.iterdir()):
            content = path.read_bytes()
            kind, _, sent = image_url(content, 100).partition(";base64,")
            assert kind == "data:image/png" and base64.b64decode(sent) != content
            got = np.asarray(Image.open(io.BytesIO(base64.b64decode(sent))).convert("RGB"))
            assert np.array_equal(got, np.asarray(open_image(content)))
    assert (np.asarray(open_image((tmp_path / "clear.png").read_bytes())) == 255).all()


def test_an_image_that_changes_during_a_run_is_left_to_the_next(tmp_path, stand_in, capsys):
    """A reply belongs to the image that was there at the start, by whose checksum it is kept."""
    rows = [*rows_of(2), {"id": 2, "image": "b.png", "question": "Which is q2?", "answer": "thing 2"}]
    write_input(tmp_path, rows)
    changing = tmp_path / "images" / "b.png"
    Image.new("RGB", (20, 10), "green").save(changing)

    def behave(asked: Asked) -> Response:
        if "q0" in asked.question:
            Image.new("RGB", (20, 10), "blue").save(changing)
        return Response(staged(asked.standard_answer))

    stand_in.behave = behave
    for kept in ([0, 1], [0, 1, 2]):
        run(tmp_path, rows, stand_in, "--requests_in_flight", "1")
        assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == kept
    assert len(stand_in.asked) == 3


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
