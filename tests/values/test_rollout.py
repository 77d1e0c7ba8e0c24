"""``rollout``: its file of values, what an interruption leaves, pairs of values, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llava_cot_jax.data.chat import Chat
from llava_cot_jax.data.settings import ChatSettings
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.rollout import main
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.scorers import Verifier
from llava_cot_jax.search.strategies import BestOfN
from tests.processes import free_port, xla_flags
from tests.search.models import trained_model

COUNT = 5
"""Number of questions."""

SEARCH = ["--num_candidates", "2", "--continuations", "2", "--judge", "verifier", "--temperature", "1.3"]
SEARCH += ["--max_new_tokens", "[12,24,30,6]", "--slots", "2"]

WHOLE = ["--search", "best_of_n", "--num_candidates", "3", "--judge", "verifier", "--temperature", "1.3"]
WHOLE += ["--top_p", "1"]

ENVIRONMENT = os.environ | {"XLA_FLAGS": xla_flags(devices=1), "JAX_PLATFORMS": "cpu"}

KEYS = ["id", "question", "images", "image_digests", "files_digest", "answer", "match", "options", "tolerance", "seed"]
KEYS += ["format", "stages", "answers"]

STAGES = ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Questions of the shapes world, of which two share a picture; one can never be right, and one cannot be asked."""
    folder, world = tmp_path_factory.mktemp("questions"), ShapesRows("train")
    (folder / "a").mkdir()
    rows = []
    for index in range(3):
        world[index].images[0].save(folder / "a" / f"{index}.png")
        asked = {"id": index, "question": world[index].turns[0].question, "image": f"a/{index}.png"}
        rows.append({**asked, "answer": world.answer(index)})
    rows.append({**rows[0], "id": "never", "answer": "a zebra"})
    rows.append({**rows[0], "id": "unasked", "question": "What is <|begin_of_text|>?"})
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "own.jsonl"


def command(questions: Path, output: Path, *more: str) -> list[str]:
    arguments = ["--data", str(questions), "--output", str(output), *SEARCH, *more]
    return [sys.executable, "-m", "llava_cot_jax.rollout", *arguments]


def files(folder: Path) -> dict[str, bytes]:
    """The files below a folder, but for one that a killed run had not written whole, beside its place."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".partial"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def uninterrupted(questions, tmp_path_factory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = subprocess.run(command(questions, folder), env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert "5 questions: " in done.stderr and "hours of one TPU v6e" in done.stderr
    return folder


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "values.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_file_of_values(questions, uninterrupted):
    """Its rows stand alone, and no candidate of a row that can never be right has a value."""
    rows = read_rows(uninterrupted)
    assert [row["id"] for row in rows] == [0, 1, 2, "never", "unasked"]
    assert list(rows[-1]) == ["id", "question", "images", "seed", "error"]
    for row in rows[:-1]:
        assert list(row) == KEYS
        assert (row["format"], row["match"]) == ("llava_cot", "yes_no" if row["id"] == 2 else "exact")
        assert [stage["stage"] for stage in row["stages"]] == STAGES
        before = []
        for stage in row["stages"]:
            assert stage["before"] == "\n\n".join(before)
            for candidate in stage["candidates"]:
                assert candidate["text"].startswith(f"<{stage['stage']}>")
                assert candidate["continuations"] == (1 if stage["stage"] == "CONCLUSION" else 2)
                assert candidate["value"] == candidate["right"] / candidate["continuations"]
                assert candidate["right"] + candidate["cut"] <= candidate["continuations"]
                assert 0 < candidate["score"] < 1 and candidate["mean_log_prob"] <= 0
            best = max(stage["candidates"], key=lambda candidate: (candidate["score"], candidate["mean_log_prob"]))
            assert stage["candidates"][stage["winner"]]["score"] == best["score"]
            before.append(stage["candidates"][stage["winner"]]["text"])
        texts = [answer["text"] for answer in row["answers"]]
        assert len(set(texts)) == len(texts) and "\n\n".join(before) in texts
        values = [candidate["value"] for stage in row["stages"] for candidate in stage["candidates"]]
        assert (max(values) > 0) == any(answer["right"] for answer in row["answers"]) == (row["id"] != "never")
        assert set(values) == {0.0} if row["id"] == "never" else values
        (image,) = row["images"]
        assert (uninterrupted / image).read_bytes() == (questions.parent / image.removeprefix("images/")).read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on(questions, uninterrupted, tmp_path):
    """Nothing that was on the disk is done again, and the files are those of an uninterrupted run."""
    values, arguments = tmp_path / "values.jsonl", command(questions, tmp_path)
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not values.exists() or values.read_bytes().count(b"\n") < 1:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = values.read_bytes().count(b"\n")
    assert 1 <= kept < COUNT
    ended = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert f"answering {kept + 1}/{COUNT} questions" in ended.stdout
    assert f"answering {kept}/{COUNT} questions" not in ended.stdout
    assert files(tmp_path) == files(uninterrupted)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_divide_the_questions(questions, uninterrupted, tmp_path):
    hosts = ["--hosts.coordinator", f"localhost:{free_port()}", "--hosts.count", "2", "--hosts.index"]
    both = [
        subprocess.Popen(command(questions, tmp_path, *hosts, index), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        for index in ("0", "1")
    ]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    assert files(tmp_path) == files(uninterrupted)


@pytest.mark.slow
def test_other_settings_are_refused(questions, uninterrupted):
    with pytest.raises(UserError, match="was begun with continuations = 2, which is 3 now"):
        main([*command(questions, uninterrupted)[3:], "--continuations", "3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*WHOLE, "--continuations", "3"], "--continuations has no meaning for --search best_of_n"),
        (["--search", "majority_vote"], r"or let the verifier score whole answers \(--search best_of_n --judge veri"),
        (["--search", "retracing"], r"candidates of stages are continued: search with stage_beam \(--search stage"),
        (["--continuations", "0"], "continuations is 0"),
    ],
)
def test_searches_whose_candidates_get_no_values(questions, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main(["--data", str(questions), "--output", str(tmp_path), *arguments])


@pytest.fixture(scope="module")
def whole(questions, tmp_path_factory) -> Path:
    """The folder of a run whose candidates are whole answers."""
    folder = tmp_path_factory.mktemp("whole")
    main(["--data", str(questions), "--output", str(folder), *WHOLE, "--max_new_tokens", "90", "--slots", "2"])
    return folder


@pytest.mark.slow
def test_whole_answers_are_those_of_the_search(questions, whole):
    """Each text once, right or wrong by its conclusion, with the scores of the same search without values."""
    rows = read_rows(whole)
    assert [row["id"] for row in rows] == [0, 1, 2, "never", "unasked"] and "error" in rows[-1]
    reasoner = Reasoner(*trained_model(), BestOfN(3, Verifier(), 1.3, 90, top_p=1.0))
    for row, asked in zip(rows[:-1], map(json.loads, questions.read_text().splitlines()), strict=False):
        assert list(row) == KEYS and row["stages"] == []
        answer = reasoner.answer(questions.parent / asked["image"], asked["question"], seed=row["seed"])
        drawn = answer.trace.stages[0].candidates
        candidates = {each.text.strip(): each for each in drawn}
        assert [each["draws"] for each in row["answers"]] == [
            sum(one.text.strip() == text for one in drawn) for text in candidates
        ]
        assert [each["text"] for each in row["answers"]] == list(candidates)
        for each in row["answers"]:
            candidate = candidates[each["text"]]
            assert each["cut"] == (candidate.ended == "max_new_tokens")
            assert each["score"] == pytest.approx(candidate.score, abs=1e-5)
            assert each["mean_log_prob"] == pytest.approx(candidate.mean_log_prob, abs=1e-5)
            conclusion = each["text"].partition("<CONCLUSION>")[2].removesuffix("</CONCLUSION>").strip()
            assert each["right"] == (not each["cut"] and conclusion == asked["answer"])
    assert {each["right"] for row in rows[:-1] for each in row["answers"]} == {False, True}
    assert open_rows(str(whole), "all").stages == ("whole",)
    with pytest.raises(UserError, match="line 1 has whole answers alone, and no stages: give --of answers"):
        main(["--values", str(whole), "--pairs", str(whole / "pairs.jsonl"), "--form", "trl"])
    assert not (whole / "pairs.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stages", "whole"])
def test_scores_are_those_that_training_computes(kind, uninterrupted, whole, tmp_path):
    """Of candidates that ended by themselves, of conclusions and of whole answers, with the model of the package."""
    folder, scores = tmp_path / "values", {}
    shutil.copytree(whole if kind == "whole" else uninterrupted, folder)
    rows = read_rows(folder)[:-1]
    for row in rows:
        for stage in row["stages"]:
            for each in stage["candidates"]:
                before = [stage["before"]] if stage["before"] else []
                scores[str(row["id"]), stage["stage"], "\n\n".join([*before, each["text"]])] = each["score"]
                each["value"] = 1.0
            stage["candidates"].append({"text": "another", "value": 0.0})  # so that no stage is left out
        for each in row["answers"]:
            scores[str(row["id"]), "whole", each["text"]] = each["score"]
            each["right"] = True
        row["answers"].append({"text": "another", "right": False})
    (folder / "values.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, processor = trained_model()
    examples = open_rows(str(folder), "all")
    found = [row for row in map(examples.__getitem__, range(len(examples))) if "another" not in row.turns[0].answer]
    asked = [Chat(processor, ChatSettings()).encode(row.turns) for row in found]
    inputs = processor.collate([each.ids for each in asked], [row.images for row in found], length=256)
    last = inputs["attention_mask"].sum(axis=1) - 1
    logits = np.asarray(model(**inputs), np.float64)[np.arange(len(last)), last]
    compared, others = Counter(), {}
    for row, each, after in zip(found, asked, logits, strict=True):
        yes, no = after[list(each.probe.answers)]
        name, stage = row.id.rsplit(" ", 1)[0].split(", ")
        score, share = scores[name, stage, row.turns[0].answer.rstrip("\n")], 1 / (1 + np.exp(no - yes))
        compared[stage] += 1
        if share != pytest.approx(score, abs=1e-4):
            others[row.turns[0].answer] = score, share
    assert compared.keys() == ({"whole"} if kind == "whole" else {*STAGES, "whole"}) and not others
