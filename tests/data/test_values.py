"""Rows of values: what is left out, how the others are weighed, which images are held out, and what is refused."""

import json
import pickle
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_cot_jax.data.chat import Chat
from llava_cot_jax.data.rows import Mixture, asks_verifier
from llava_cot_jax.data.settings import ChatSettings, VerifierSettings
from llava_cot_jax.data.sources import open_rows, open_training_rows, open_validation_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.conversation import read_conversation
from llava_cot_jax.processing.probe import DEFAULT_JUDGE_PROMPTS
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.stage_format import StageFormat
from tests.data.rows import demo_processor
from tests.value_files import question, write_values

SETTINGS = VerifierSettings()

MIXED = {"SUMMARY": [0.75, 0.75, 0.75, 0.75], "CAPTION": [1, 0.25, 0.75, 1], "REASONING": [0.5, 0, 0.5, None]}
"""Candidates of a question that is worth asking about."""


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty questions about twenty pictures, of which each is there under two names, and some that teach nothing."""
    lines, images = [], {}
    for i in range(40):
        images[f"images/{i}.png"] = picture(i // 2)
        summary = [1, 0, 0.5, 0.5] if i % 4 == 0 else [0.75] * 4
        lines.append(question(f"q{i}", f"images/{i}.png", MIXED | {"SUMMARY": summary}, [True, False, False]))
    lines.append(question("always", "images/0.png", {"SUMMARY": [1, 1], "CAPTION": [1, 1]}, [True]))
    lines.append(question("never", "images/0.png", {"SUMMARY": [0, 0]}, [False]))
    lines.append({"id": "broken", "error": "there is no such image"})
    return write_values(tmp_path_factory.mktemp("values") / "values", lines, images)


def everything(folder, settings=SETTINGS):
    """Return what each row of both splits trains: (id, target, weight)."""
    rows = [open_rows(str(folder), split, settings) for split in ("train", "validation")]
    return {row[i].id: row.turns(i)[0].target for row in rows for i in range(len(row))}


def test_what_is_left_out_and_what_is_said_of_it(folder):
    found = everything(folder)
    assert not any(name.startswith(("always", "never")) for name in found)
    assert {name for name in found if name.startswith("q1,")} == {
        *(f"q1, CAPTION {i}" for i in (1, 2, 3, 4)),
        *(f"q1, REASONING {i}" for i in (1, 2, 3)),
        *(f"q1, whole {i}" for i in (1, 2, 3)),
    }
    summaries = [open_rows(str(folder), split).summary for split in ("train", "validation")]
    left = [line for line in summaries if "1 questions without an answer, 2 questions with nothing to choose" in line]
    assert len(left) == 1 and "stages with nothing to choose" in left[0]


def test_candidates_of_the_same_text_are_one(tmp_path):
    row = question("q", "a.png", {"SUMMARY": [1, 0, 0.5], "CAPTION": [0.5, 1]}, [True])
    for stage in row["stages"]:
        for each in stage["candidates"][1:]:
            each["text"] = stage["candidates"][1]["text"]
    row["stages"][1]["candidates"][0]["text"] = row["stages"][1]["candidates"][1]["text"]
    found = everything_in_one(write_values(tmp_path / "values", [row], {"a.png": picture(0)}))
    assert {name: target.value for name, target in found.items()} == {"q, SUMMARY 1": 1, "q, SUMMARY 2": 0.25}


def test_weights_against_fractions(folder):
    """Within a stage the better half weighs as much as the worse; each stage as much as any other."""
    rows = open_rows(str(folder), "train")
    weights: dict[str, dict[str, Fraction]] = {}
    for i in range(len(rows)):
        name, stage = rows[i].id.rsplit(" ", 1)[0].split(", ")
        weights.setdefault(stage, {}).setdefault(name, Fraction(0))
        weights[stage][name] += Fraction(rows.turns(i)[0].target.weight)
    totals = {stage: float(sum(each.values())) for stage, each in weights.items()}
    assert totals.keys() == {"SUMMARY", "CAPTION", "REASONING", "whole"}
    assert sum(totals.values()) == pytest.approx(len(rows))
    assert list(totals.values()) == pytest.approx([len(rows) / 4] * 4)

    found = {rows[i].id: rows.turns(i)[0].target for i in range(len(rows))}
    name = next(name.split(",")[0] for name in found if "SUMMARY" in name)
    for stage, better, worse in (("SUMMARY", (1, 3, 4), (2,)), ("CAPTION", (1, 3, 4), (2,)), ("whole", (1,), (2, 3))):
        each = [[found[f"{name}, {stage} {i}"].weight for i in side] for side in (better, worse)]
        assert sum(each[0]) == pytest.approx(sum(each[1])) and len(set(each[0])) == len(set(each[1])) == 1
    assert [found[f"{name}, CAPTION {i}"].value for i in (1, 2, 3, 4)] == MIXED["CAPTION"]


def test_the_few_texts_of_a_stage_do_not_outweigh_all_others(tmp_path):
    """Two summaries among two hundred captions and four hundred answers weigh at most four each, and not a hundred."""
    lines = [
        question(f"q{i}", "a.png", {"SUMMARY": [0 if i == 0 else 1, 1], "CAPTION": [0, 1]}, [True, False, True, False])
        for i in range(100)
    ]
    folder = write_values(tmp_path / "values", lines, {"a.png": picture(0)})
    found = everything_in_one(folder)
    totals = {
        stage: sum(target.weight for name, target in found.items() if stage in name)
        for stage in ("SUMMARY", "CAPTION", "whole")
    }
    assert totals == pytest.approx({"SUMMARY": 8, "CAPTION": (602 - 8) / 2, "whole": (602 - 8) / 2})
    double = everything_in_one(folder, replace(SETTINGS, stage_weights={"SUMMARY": 2.0}))
    weights = sum(target.weight for name, target in double.items() if "SUMMARY" in name)
    assert weights == pytest.approx(16 * 602 / 610)
    assert "602 texts of 100 questions to ask the verifier about (CAPTION 200, SUMMARY 2, whole 400);" in (
        open_rows(str(folder), "all").summary
    )


def test_a_stage_counts_by_how_far_its_candidates_are_apart(tmp_path):
    near = question("near", "a.png", {"SUMMARY": [1, 1, 1, 0.75]}, [True, False])
    far = question("far", "a.png", {"SUMMARY": [1, 1, 1, 0]}, [True, False])
    found = everything_in_one(write_values(tmp_path / "values", [near, far], {"a.png": picture(0)}))
    assert found["far, SUMMARY 4"].weight == pytest.approx(4 * found["near, SUMMARY 4"].weight)


def everything_in_one(folder, settings=SETTINGS):
    """Return the targets of the only split that there is."""
    for split in ("train", "validation"):
        try:
            rows = open_rows(str(folder), split, settings)
        except UserError:
            continue
        return {rows[i].id: rows.turns(i)[0].target for i in range(len(rows))}
    raise AssertionError


def test_images_are_held_out_by_their_bytes(folder):
    train, validation = (open_rows(str(folder), split) for split in ("train", "validation"))
    pictures = [{rows[i].images[0] for i in range(len(rows))} for rows in (train, validation)]
    assert not pictures[0] & pictures[1] and len(pictures[0] | pictures[1]) == 20 and pictures[1]
    numbers = {int(rows[i].id.split(",")[0][1:]) for rows in (validation,) for i in range(len(rows))}
    assert {number ^ 1 for number in numbers} == numbers  # both names of a picture


def test_values_that_are_not_trained_on_are_validated_on_whole(folder, tmp_path):
    """Those that are trained on never are: without held-out images, the run is refused."""
    train, validation = (open_rows(str(folder), split) for split in ("train", "validation"))
    apart = open_validation_rows("shapes", str(folder), 10_000)
    assert len(apart) == len(train) + len(validation)
    shared = open_validation_rows({"shapes": 1, str(folder): 1}, str(folder), 10_000)
    assert shared.rows.fingerprint == validation.fingerprint
    target = write_values(tmp_path / "values", [question("q", "a.png", MIXED, [True, False])], {})
    (target / "a.png").write_bytes(train[0].images[0])
    assert len(open_training_rows(str(target))) and len(open_validation_rows("shapes", str(target), 10_000))
    with pytest.raises(UserError, match=r"validation: 0 texts .* roll out more questions .a training may validate on"):
        open_validation_rows(str(target), str(target), 10_000)


def test_a_question_with_images_of_both_splits_is_in_neither(folder, tmp_path):
    split = {open_rows(str(folder), split)[0].images[0] for split in ("train", "validation")}
    lines = [question("both", ["0.png", "1.png"], MIXED, [True, False]), question("one", "0.png", MIXED, [True, False])]
    lines.append(question("other", "1.png", MIXED, [True, False]))
    target = write_values(tmp_path / "values", lines, {})
    for number, content in enumerate(split):
        (target / f"{number}.png").write_bytes(content)
    assert {name.split(",")[0] for name in everything(target)} == {"one", "other"}
    assert "1 questions with images of both splits" in open_rows(str(target), "train").summary


CHANGES = {
    "targets": "hard",
    "stage_weights": {"CAPTION": 2.0},
    "judge_prompts": "mine.yaml",
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_of_the_rows_counts(folder, tmp_path, name):
    """``weight`` is a setting of the loss."""
    assert {*CHANGES, "weight"} == asdict(SETTINGS).keys()
    value = CHANGES[name]
    if name == "judge_prompts":
        value = str(tmp_path / value)
        text = DEFAULT_JUDGE_PROMPTS.read_text().replace("Is this caption right?", "Is it?")
        (tmp_path / "mine.yaml").write_text(text)
    changed = replace(SETTINGS, **{name: value})
    before, after = everything(folder), everything(folder, changed)
    assert before != after
    fingerprints = {open_rows(str(folder), "train", each).fingerprint for each in (SETTINGS, changed)}
    assert len(fingerprints) == 2
    if name == "targets":
        assert {target.value for target in after.values()} == {0, 1}
    if name == "stage_weights":

        def total(found, stage):
            return sum(target.weight for name, target in found.items() if stage in name)

        assert total(after, "CAPTION") / total(after, "REASONING") == pytest.approx(
            2 * total(before, "CAPTION") / total(before, "REASONING")
        )
        assert not any("whole" in name for name in everything(folder, replace(SETTINGS, stage_weights={"whole": 0})))


def test_rows_mix_with_others_and_travel_to_workers(folder):
    rows = open_training_rows({"shapes": 1, str(folder): 2})
    assert isinstance(rows, Mixture) and [asks_verifier(part) for part in rows.parts] == [False, True]
    copy = pickle.loads(pickle.dumps(rows.parts[1]))
    assert [copy[i] for i in (0, 5)] == [rows.parts[1][i] for i in (0, 5)] and copy.fingerprint == rows.parts[
        1
    ].fingerprint
    held_out = open_validation_rows({"shapes": 1, str(folder): 2}, None, 20)
    assert [len(part) for part in held_out.parts] == [10, 10] and asks_verifier(held_out.parts[1])
    with pytest.raises(IndexError):
        rows.parts[1].turns(len(rows.parts[1]))


def test_each_image_is_read_once_for_all_splits(tmp_path, monkeypatch):
    lines = [question(f"q{i}", f"{i}.png", MIXED, [True, False]) for i in range(20)]
    folder = write_values(tmp_path / "values", lines, {f"{i}.png": picture(i) for i in range(20)})
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    for _ in range(2):  # before anything slow is imported, and in the run
        open_training_rows(str(folder))
        open_validation_rows(str(folder), None, 10)
    assert sorted(name for name in read if name.endswith(".png")) == sorted(f"{i}.png" for i in range(20))
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
    lines[0]["seed"] = 2
    (folder / "values.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = open_rows(str(folder), "train")
    assert read.count("0.png") == 2 and len(rows)


def test_the_fingerprint_is_of_the_content(folder, tmp_path):
    lines = [json.loads(line) for line in (folder / "values.jsonl").read_text().splitlines()]
    images = {f"images/{i}.png": picture(i // 2) for i in range(40)}
    same = write_values(tmp_path / "same", lines, images)
    other = write_values(tmp_path / "other", lines, images | {"images/39.png": picture(50)})
    assert open_rows(str(same), "train").fingerprint == open_rows(str(folder), "train").fingerprint
    assert open_rows(str(other), "train").fingerprint != open_rows(str(folder), "train").fingerprint


def test_answers_that_do_not_fit_or_have_a_special_token_are_skipped(folder):
    rows = open_rows(str(folder), "train")
    turns = rows.turns(0)
    processor = demo_processor()
    size = Chat(processor, ChatSettings()).sizes([turns])[0]
    conversation = Chat(processor, ChatSettings(upstream_quirks=True)).encode(turns)
    assert len(conversation.ids) == size.tokens and not conversation.loss_mask.any()
    spoilt = [replace(turns[0], answer=turns[0].answer + "<|eot_id|>")]
    sizes = Chat(processor, ChatSettings(max_length=size.tokens - 1)).sizes([turns, spoilt])
    assert sizes[0] == f"its answer with the verifier's question does not fit into {size.tokens - 1} tokens"
    assert sizes[1] == "its answer contains the special token <|eot_id|>"


OWN_FORMAT = """
stages:
  - {name: THOUGHTS, ask: "Think about this first: {question} Then answer.", opening: "# Thoughts"}
  - {name: ANSWER, opening: "# Answer"}
"""


def test_the_prompt_is_that_of_the_search(tmp_path):
    """Of every format, for questions with white space at their ends and a word that is no marker of an image."""
    (tmp_path / "own.yaml").write_text(OWN_FORMAT)
    formats, asked = ["llava_cot", "mulberry", str(tmp_path / "own.yaml")], "<image> is a word,\n isn't it? "
    lines = [
        question(f"{i}", images, MIXED, [True, False]) | {"format": format, "question": asked}
        for i, format in enumerate(formats)
        for images in ("a.png", [])
    ]
    images = {"a.png": picture(0)}
    rows = open_rows(str(write_values(tmp_path / "values", lines, images)), "all")
    processor, seen = demo_processor(), set()
    chat = Chat(processor, ChatSettings(text_only=True))
    builders = [RequestBuilder(processor, StageBeam(2, format=StageFormat.load(name))) for name in formats]
    for i in range(len(rows)):
        (turn,) = rows.turns(i)
        number = int(rows[i].id[0])
        prompt = builders[number].prompt(read_conversation(asked, rows[i].images))
        (want,) = processor.tokenize([prompt + turn.answer + turn.target.probe.text(processor)])
        assert chat.encode([turn]).ids == want
        seen.add((number, turn.images))
    assert len(seen) == 6


def test_the_answers_of_the_verifier_are_checked_before_the_first_batch(folder, tmp_path):
    prompts = DEFAULT_JUDGE_PROMPTS.read_text().replace('answers: [" yes", " no"]', 'answers: [" yes indeed", " no"]')
    (tmp_path / "mine.yaml").write_text(prompts)
    rows = open_rows(str(folder), "train", replace(SETTINGS, judge_prompts=str(tmp_path / "mine.yaml")))
    with pytest.raises(UserError, match="the answer ' yes indeed' is not one natural next token"):
        Chat(demo_processor(), ChatSettings()).sizes([rows.turns(0)])


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ('{"id": 1', {}, "values.jsonl, line 1 is damaged .*: let `llava-cot rollout` finish, or remove the line"),
        ({"stages": [{}]}, {}, "line 1 is damaged .KeyError"),
        ({"format": "mine"}, {}, 'line 1: there is no stage format mine: .* of its YAML file .* under "format"'),
        ({"images": ["gone.png"]}, {}, "gone.png"),
        (
            {},
            {"stage_weights": {"CAPTIONS": 2}},
            "has the stage CAPTIONS, which no values have: their stages are SUMMARY, CAPTION, REASONING, whole",
        ),
        ({"split": "test"}, {}, "line 1: the question is of the split test, which is for measuring: roll out --split"),
        ({}, {"judge_prompts": "nowhere.yaml"}, "nowhere.yaml"),
        ({}, {"stage_weights": dict.fromkeys([*MIXED, "whole"], 0.0)}, "nothing is left to learn from; roll out more"),
    ],
)
def test_what_is_refused(tmp_path, line, settings, message):
    row = question("q", "a.png", MIXED, [True, False])
    folder = write_values(tmp_path / "values", [row if isinstance(line, str) else row | line], {"a.png": picture(3)})
    if isinstance(line, str):
        (folder / "values.jsonl").write_text(line)
    with pytest.raises(UserError, match=message) as told:
        open_training_rows(str(folder), VerifierSettings(**settings))
    assert "\n" not in str(told.value)


def test_a_stage_may_be_that_of_one_folder_alone(folder, tmp_path):
    lines = [question("q", "a.png", {"RATIONALES": [1, 0]}, [True, False])]
    other = write_values(tmp_path / "values", lines, {"a.png": picture(3)})
    weights = VerifierSettings(stage_weights={"CAPTION": 2.0, "RATIONALES": 3.0})
    assert len(open_training_rows({str(folder): 1, str(other): 1}, weights).parts) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "verifier.weight is 0.0; it must be above 0"),
        ({"targets": "warm"}, "verifier.targets is 'warm'; it is one of soft, hard"),
        ({"stage_weights": {"CAPTION": -1.0}}, "verifier.stage_weights of CAPTION is -1.0; it must not be negative"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        VerifierSettings(**settings)
