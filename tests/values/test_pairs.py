"""Pairs for preference training: which candidates make one, and the rows of each form as its trainer documents them."""

import json
from pathlib import Path

import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.rollout import main


@pytest.fixture
def values(tmp_path) -> Path:
    """A folder of two rows of values, of which one has no answer."""
    pairs = {"SUMMARY": ("", [("s1", 0.5), ("s2", 0.75)]), "CAPTION": ("s2", [("c1", 0.25), ("c2", 0.75), ("c1", 0.5)])}
    stages = [
        {"stage": stage, "before": before, "winner": 0, "candidates": [{"text": t, "value": v} for t, v in candidates]}
        for stage, (before, candidates) in pairs.items()
    ]
    row = {"id": "a", "question": "What?", "images": ["images/a.png", "images/b.png"], "stages": stages}
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--values", "{}", "--pairs", "p"], "--form is missing: pairs are written by --values FOLDER --pairs FILE"),
        (["--min_difference", "0.5"], "--values is missing"),
        (["--values", "{}", "--pairs", "p", "--form", "trl", "--min_difference", "0"], "min_difference is 0.0"),
        (["--values", "{}", "--pairs", "p", "--form", "trl", "--output", "o"], "--output has no meaning with --values"),
        (["--values", "nowhere", "--pairs", "p", "--form", "trl"], "nowhere/values.jsonl does not exist"),
        (["--values", "{}/..", "--pairs", "p", "--form", "trl"], "values.jsonl, line 1 has no images"),
    ],
)
def test_what_cannot_be_used(values, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "values.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(UserError, match=message) as told:
        main([argument.format(values) for argument in arguments])
    assert "\n" not in str(told.value) and not (tmp_path / "p").exists()
