"""Rejection sampling with this project's own model."""

import json
import shutil
from typing import Any

import pytest

from llava_cot_jax import annotate, prepare
from llava_cot_jax.annotation.checking import Problem
from llava_cot_jax.annotation.outcomes import RowOutcome
from llava_cot_jax.annotation.rows import NamedImage, RowToAnnotate, TurnToAnnotate
from llava_cot_jax.annotation.sampling import SampleRequest, sample_for_row
from llava_cot_jax.data.chat import Chat
from llava_cot_jax.data.prepared import PreparedRows
from llava_cot_jax.data.settings import ChatSettings
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS
from llava_cot_jax.stages import is_staged
from tests.annotation.runs import write_world
from tests.annotation.stand_in_endpoint import staged

TURNS = (TurnToAnnotate("First?", ("blue",)), TurnToAnnotate("Second?", (2,)))
SELF = ["--model=self", "--max_new_tokens=160"]
ROW = RowToAnnotate(7, (NamedImage("a.png", "a.png", 9, 1),), TURNS)


def candidate(text: str, score: float, mean_log_prob: float = -1.0) -> dict[str, Any]:
    return {"text": text, "score": score, "mean_log_prob": mean_log_prob}


def outcome_of(replies: list[dict[str, Any]], tries: int = 2) -> tuple[list[SampleRequest], RowOutcome]:
    """The requests about the row that these replies answer, and the outcome."""
    steps, asked = sample_for_row(ROW, {"seed": 0}, tries), []
    try:
        asked.append(next(steps))
        for reply in replies:
            asked.append(steps.send(reply))
    except StopIteration as end:
        return asked, end.value
    raise AssertionError("more replies are asked for")


def test_the_best_of_the_candidates_that_agree_is_kept():
    first = [
        candidate(staged("red"), 0.9),
        candidate(staged("Blue.", CAPTION="worse"), 0.2),
        candidate(staged("blue", CAPTION="less likely"), 0.4, -2.0),
        candidate(staged("blue", CAPTION="best"), 0.4, -1.0),
        candidate("blue", 0.99),
    ]
    second = [candidate(staged("three"), 0.5), candidate(staged("2 of them"), 0.1)]
    asked, outcome = outcome_of([{"candidates": first}, {"candidates": second}])
    assert outcome.kept == {0: staged("blue", CAPTION="best"), 1: staged("2 of them")} and not outcome.failed
    first_asked, second_asked = asked
    assert first_asked.messages == (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "First?"}]},
    )
    assert [message["role"] for message in second_asked.messages] == ["user", "assistant", "user"]
    assert second_asked.messages[1]["content"] == outcome.kept[0]
    assert second_asked.messages[2]["content"] == [{"type": "text", "text": "Second?"}]


def test_candidates_are_sampled_again_with_another_seed_and_then_given_up():
    wrong = {"candidates": [candidate("no form", 0.9), candidate(staged("red"), 0.1)]}
    asked, outcome = outcome_of([wrong, wrong, wrong, {"error": "the context is full"}])
    assert [(each.turn, each.attempt) for each in asked] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({each.seed for each in asked}) == len({each.key for each in asked}) == 4
    kinds = [(each.turn, each.fault.kind) for each in outcome.failed]
    assert kinds == [(0, Problem.CONCLUSION)] * 2 + [(1, Problem.CONCLUSION), (1, Problem.QUESTION)]
    rejected = outcome.rejected(ROW)
    assert [row["turn"] for row in rejected] == [1, 2]
    assert rejected[0]["detail"] == "its conclusion 'red' is not the standard answer 'blue'"
    assert rejected[0]["tries"][0] == {"reason": "wrong conclusion", "reply": staged("red")}
    assert len(asked[2].messages) == 1  # the second question is asked without the turn that was rejected


@pytest.mark.slow
def test_rows_that_the_model_makes_are_prepared_for_training(tmp_path, capsys, monkeypatch):
    (tmp_path / "world").mkdir()
    given = [*write_world(tmp_path / "world", 6), *SELF, "--num_candidates=2", "--slots=3", "--temperature=0.9"]
    output = tmp_path / "made.jsonl"
    annotate.main([*given, f"--output={output}"])
    said = capsys.readouterr()
    assert "7 turns, for each of which 2 candidates are sampled at most 2 times" in said.out
    assert "the small model of the package answers" in " ".join(said.err.split())
    whole = output.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) >= 4  # the model knows its world
    asked = {row["id"]: row for row in map(json.loads, (tmp_path / "world/questions.jsonl").read_text().splitlines())}
    for row in rows:
        known = dict(zip(asked[row["id"]]["questions"], asked[row["id"]]["answers"], strict=True))
        for human, model in zip(row["conversations"][::2], row["conversations"][1::2], strict=True):
            assert is_staged(model["value"])
            assert model["value"].endswith(f"<CONCLUSION> {known[human['value']]} </CONCLUSION>")
    journal = tmp_path / "made.journal.jsonl"
    replies = [json.loads(line) for line in journal.read_text().splitlines()]
    assert all(len(reply["reply"]["candidates"]) == 2 for reply in replies)

    # A run that was stopped goes on, samples what is missing alone, and makes the same file.
    kept = journal.read_bytes().splitlines(keepends=True)[:3]
    journal.write_bytes(b"".join(kept) + b'{"key": "torn')
    output.unlink()
    annotate.main([*given, f"--output={output}"])
    assert output.read_bytes() == whole
    assert journal.read_bytes().splitlines(keepends=True)[:3] == kept
    shutil.copytree(tmp_path / "world", tmp_path / "moved")  # a finished output takes no model, and no time
    monkeypatch.setattr(annotate, "_run_sampler", None)
    annotate.main([*given, f"--output={output}", f"--images={tmp_path}/moved"])
    assert output.read_bytes() == whole

    prepared = ["--annotations", str(output), "--images", str(tmp_path / "world"), "--output", str(tmp_path / "data")]
    prepare.main([*prepared, "--workers=0", "--validation_share=0"])
    # No turn of them is cut or skipped.
    chat = Chat(Processor.from_pretrained("shapes"), ChatSettings(max_length=512))
    stored = PreparedRows(tmp_path / "data", "train")
    sizes = chat.sizes([stored.turns(i) for i in range(len(stored))])
    assert len(sizes) == len(rows) and {size.cut_turns for size in sizes} == {0}


def test_other_settings_sample_anew(tmp_path, monkeypatch):
    """The digest of a request depends on each option that the candidates depend on."""
    (tmp_path / "world").mkdir()
    given = [*write_world(tmp_path / "world", 2), *SELF]
    keys: list[str] = []
    monkeypatch.setattr(annotate, "_report", lambda *_: None)
    monkeypatch.setattr(
        annotate, "_run_sampler", lambda options, model, job, images, shown: keys.append(next(job.outcomes())[1].key)
    )
    options = ["--seed=1", "--num_candidates=3", "--temperature=0.5", "--max_new_tokens=99", "--dtype=float16"]
    options += ["--quantize=int8", "--convention=transformers_5", "--tries=3"]
    prompts = DEFAULT_JUDGE_PROMPTS.read_text().replace("probe:", "probe: # mine")
    (tmp_path / "judge.yaml").write_text(prompts)
    for i, option in enumerate([f"--judge_prompts={tmp_path}/judge.yaml", "--slots=3", *options]):
        annotate.main([*given, f"--output={tmp_path}/{i}.jsonl", option])
    assert len(set(keys)) == len(keys) - 1 and keys[1] == keys[-1]  # the number of tries changes no request
