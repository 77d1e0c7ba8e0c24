"""Pairs for preference training: which candidates make one, and the rows of each form as its trainer documents them."""

import json
from pathlib import Path

import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.messages import question_text
from llava_cot_jax.rollout import main
from llava_cot_jax.stage_format import StageFormat


@pytest.fixture
def values(tmp_path) -> Path:
    """A folder of two rows of values, of which one has no answer."""
    pairs = {"SUMMARY": ("", [("s1", 0.5), ("s2", 0.75)]), "CAPTION": ("s2", [("c1", 0.25), ("c2", 0.75), ("c1", 0.5)])}
    stages = [
        {"stage": stage, "before": before, "winner": 0, "candidates": [{"text": t, "value": v} for t, v in candidates]}
        for stage, (before, candidates) in pairs.items()
    ]
    answers = [{"text": text, "right": text[0] == "r", "cut": text[0] == "c"} for text in ("cut", "w1", "r1", "r2")]
    row = {"id": "a", "question": "What?", "images": ["images/a.png", "images/b.png"], "stages": stages}
    row |= {"answers": answers, "format": "llava_cot"}
    rows = [row, {"id": "b", "question": "Why?", "images": [], "seed": 0, "error": "none"}]
    (tmp_path / "values").mkdir()
    (tmp_path / "values" / "values.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "values"


def pairs_of(values: Path, path: Path, form: str, *more: str) -> list[dict]:
    main(["--values", str(values), "--pairs", str(path), "--form", form, *more])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_llama_factory(values):
    """Keys of data/README.md of LLaMA-Factory, "Preference Dataset" of the ShareGPT format; paths beside the file.

    The two candidates with one text share the mean of their values, 0.375.
    """
    assert pairs_of(values, values / "pairs.jsonl", "llama_factory") == [
        {
            "conversations": [{"from": "human", "value": "<image>\n<image>\nWhat?"}],
            "chosen": {"from": "gpt", "value": "s2\n\nc2"},
            "rejected": {"from": "gpt", "value": "s2\n\nc1"},
            "images": ["images/a.png", "images/b.png"],
        }
    ]


def test_trl(values, tmp_path):
    """The form of trl-lib/rlaif-v, which TRL's examples of preference data with images name."""
    first, second = pairs_of(values, tmp_path / "pairs.jsonl", "trl", "--min_difference", "0.2")
    asked = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    assert first == {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "s2"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "s1"}]}],
        "images": ["values/images/a.png", "values/images/b.png"],
    }
    assert second["chosen"][0]["content"][0]["text"] == "s2\n\nc2"


def test_pairs_of_whole_answers(values):
    (pair,) = pairs_of(values, values / "pairs.jsonl", "llama_factory", "--of", "answers")
    assert (pair["chosen"]["value"], pair["rejected"]["value"]) == ("r1", "w1")


@pytest.mark.parametrize(("better", "pairs"), [(0.6, 1), (0.59, 0), (None, 0)])
def test_the_least_difference_is_one_that_makes_a_pair(values, better, pairs):
    """0.6 - 0.4 is less than 0.2 in floats. A candidate without a value is in no pair."""
    candidates = [{"text": "s1", "value": 0.4}, {"text": "s2", "value": better}]
    write(values, [{"before": "", "candidates": candidates}])
    assert len(pairs_of(values, values / "pairs.jsonl", "trl", "--min_difference", "0.2")) == pairs


def write(
    values: Path, stages: list[dict], question: str = "What?", images: int = 1, format: str = "llava_cot"
) -> None:
    row = {"id": "a", "question": question, "images": ["a.png"] * images, "stages": stages, "answers": []}
    row |= {"format": format}
    (values / "values.jsonl").write_text(json.dumps(row) + "\n")


STAGES = [{"before": "", "candidates": [{"text": "s1", "value": 0}, {"text": "s2", "value": 1}]}]


@pytest.mark.parametrize(
    ("question", "images", "asked"),
    [
        ("<image>\nWhat?", 1, "<image>\nWhat?"),
        ("What?\n<image>", 2, "<image>\n<image>\nWhat?"),
        ("Is <image> a word?", 1, None),
        ("<image>", 0, None),
    ],
)
def test_as_many_markers_as_images(values, caplog, question, images, asked):
    """LLaMA-Factory takes any other marker for an image too."""
    write(values, STAGES, question, images)
    pairs = pairs_of(values, values / "pairs.jsonl", "llama_factory")
    assert [pair["conversations"][0]["value"] for pair in pairs] == ([asked] if asked else [])
    assert ("1 pairs are left out, as <image> is a word" in caplog.text) == (asked is None)
    (pair,) = pairs_of(values, values / "pairs.jsonl", "trl")
    assert pair["prompt"][0]["content"][-1]["text"] == question_text(question, images)


def test_a_marker_in_an_answer_is_left_out_for_llama_factory(values, caplog):
    candidates = [{"text": text, "value": value} for text, value in (("good", 1), ("<image>", 0), ("bad", 0.2))]
    write(values, [{"before": "", "candidates": candidates}])
    pairs = pairs_of(values, values / "pairs.jsonl", "llama_factory")
    assert [pair["rejected"]["value"] for pair in pairs] == ["bad"] and "1 pairs are left out" in caplog.text
    assert len(pairs_of(values, values / "pairs.jsonl", "trl")) == 2


@pytest.mark.parametrize("form", ["trl", "llama_factory"])
def test_the_question_is_the_one_that_the_model_was_asked(values, form):
    """With what its format puts around it; one whose format is gone is refused."""
    write(values, STAGES, format="mulberry")
    before, after = StageFormat.load("mulberry").around_question
    (pair,) = pairs_of(values, values / "pairs.jsonl", form)
    asked = (
        pair["prompt"][0]["content"][-1]["text"]
        if form == "trl"
        else pair["conversations"][0]["value"].removeprefix("<image>\n")
    )
    assert before + after and asked == f"{before}What?{after}"
    write(values, STAGES, format="mine")
    with pytest.raises(UserError, match="there is no stage format mine"):
        pairs_of(values, values / "pairs.jsonl", form)


def test_values_are_not_overwritten(values):
    before = (values / "values.jsonl").read_bytes()
    (values / "link").symlink_to("values.jsonl")
    for name in ("values.jsonl", "values.jsonl.settings.json", "link"):
        with pytest.raises(UserError, match="has the values themselves: give --pairs another name"):
            pairs_of(values, values / ".." / values.name / name, "trl")
    assert (values / "values.jsonl").read_bytes() == before


@pytest.mark.parametrize("stage", [{"before": ""}, {"before": "", "candidates": [{"value": 1}]}, None])
def test_a_damaged_line_is_named(values, stage):
    write(values, [stage])
    (values / "pairs.jsonl").write_text("old")
    with pytest.raises(UserError, match=r"values\.jsonl, line 1 is damaged"):
        pairs_of(values, values / "pairs.jsonl", "trl")
    assert (values / "pairs.jsonl").read_text() == "old" and len(list(values.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--values", "{}", "--pairs", "p"], "--form is missing: pairs are written by --values FOLDER --pairs FILE"),
        (["--min_difference", "0.5"], "--values is missing"),
        (["--values", "{}", "--pairs", "p", "--form", "trl", "--min_difference", "0"], "min_difference is 0.0"),
        (["--values", "{}", "--pairs", "p", "--form", "trl", "--output", "o"], "--output has no meaning with --values"),
        (["--values", "{}", "--pairs", "p", "--form", "trl", "--limit", "3"], "--limit has no meaning with --values"),
        (["--values", "nowhere", "--pairs", "p", "--form", "trl"], "nowhere/values.jsonl does not exist"),
        (["--values", "{}/..", "--pairs", "p", "--form", "trl"], "values.jsonl, line 1 has no answers"),
        (["--data", "{}"], "has values, whose answers are the model's own: give the data that they are of"),
        (["--data", "own.jsonl", "--first", "1"], "own.jsonl has no row 1: lower --first"),
        (
            ["--data", "own.jsonl", "--match", "json:nothing"],
            "--match is 'json:nothing'; it must be exact, option, yes",
        ),
        (["--data", "own.jsonl", "--match", "no_module:f"], "cannot be imported .*: put its folder on PYTHONPATH"),
        (["--data", "own.jsonl", "--output", "prepared"], "has prepared data, which values would hide"),
    ],
)
def test_what_cannot_be_used(values, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "values.jsonl").write_text('{"question": "x"}\n')
    (tmp_path / "own.jsonl").write_text('{"id": 1, "question": "x", "answer": 1}\n')
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "prepared.json").write_text("{}")
    with pytest.raises(UserError, match=message) as told:
        main([argument.format(values) for argument in arguments])
    assert "\n" not in str(told.value) and not (tmp_path / "p").exists()
