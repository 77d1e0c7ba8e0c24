"""``evaluate``: its result, what an interruption leaves, and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluate import main
from llava_cot_jax.model.mllama import Mllama
from tests.processes import free_port, xla_flags

COUNT = 12
"""Number of questions of the shapes world."""

SEARCH = ["--search", "sample", "--max_new_tokens", "90", "--slots", "3"]


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def read_result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def command(output: Path, *more: str) -> list[str]:
    arguments = ["--benchmark", "shapes", "--limit", str(COUNT), "--output", str(output), *SEARCH, *more]
    return [sys.executable, "-m", "llava_cot_jax.evaluate", *arguments]


ENVIRONMENT = os.environ | {"XLA_FLAGS": xla_flags(devices=1), "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    subprocess.run(command(folder), env=ENVIRONMENT, check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_the_result_of_the_shapes_world(uninterrupted):
    """What is right is found anew, from the texts of the answers and the world alone."""
    rows, result, world = read_rows(uninterrupted), read_result(uninterrupted), ShapesRows("test")
    assert [row["id"] for row in rows] == [f"test-{i}" for i in range(COUNT)]
    right = []
    for i, row in enumerate(rows):
        (conclusion,) = re.findall(r"<CONCLUSION>(.*)</CONCLUSION>", row["text"]) or [""]
        right.append(conclusion.split() == world.answer(i).split())
        assert (row["answer"], row["right"], row["category"]) == (world.answer(i), right[-1], world.kind(i))
        assert (row["question"], row["seed"]) == (world[i].turns[0].question, row["seed"])
    assert len({row["seed"] for row in rows}) == COUNT
    found = result["accuracy"]
    assert (found["all"]["questions"], found["all"]["right"], found["all"]["unanswered"]) == (COUNT, sum(right), 0)
    assert sum(right) > COUNT // 2  # the package's model knows this world
    for number, kind in enumerate(("look_up", "count", "compare", "relation")):
        assert found["categories"][kind]["right"] == sum(right[number::4])
    assert result["matches"] == {"exact": 9, "yes_no": 3}
    sampled = sum(row["tokens"]["candidates"] for row in rows)
    assert result["tokens_per_question"]["candidates"] == pytest.approx(sampled / COUNT)
    flops = sum(sum(row["flops"].values()) for row in rows)
    assert result["flops_per_question"]["total"] == pytest.approx(flops / COUNT)
    assert result["run"]["search"].startswith("Sample(temperature=0.6, max_new_tokens=90")
    assert (result["run"]["checkpoint"], result["run"]["format"], result["run"]["seed"]) == ("shapes", "llava_cot", 0)
    (environment,) = result["environments"]
    assert environment["device"] == "1 x cpu" and environment["jax"]


@pytest.mark.slow
def test_a_killed_run_goes_on(uninterrupted, tmp_path):
    """No answer that was on the disk is asked again, and the files are those of an uninterrupted run."""
    answers = tmp_path / "answers.jsonl"
    process = subprocess.Popen(command(tmp_path), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not answers.exists() or answers.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = answers.read_bytes().split(b"\n")[:-1]
    assert 3 <= len(kept) < COUNT and not (tmp_path / "result.json").exists()
    ended = subprocess.run(command(tmp_path), env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert f"answering {len(kept) + 1}/{COUNT} questions" in ended.stdout
    assert f"answering {len(kept)}/{COUNT} questions" not in ended.stdout
    for name in ("answers.jsonl", "result.json"):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_divide_the_questions(uninterrupted, tmp_path):
    hosts = ["--hosts.coordinator", f"localhost:{free_port()}", "--hosts.count", "2", "--hosts.index"]
    both = [
        subprocess.Popen(command(tmp_path, *hosts, index), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for index in ("0", "1")
    ]
    printed = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "standard error" in printed[0] and not printed[1]
    for name in ("answers.jsonl", "result.json"):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()


@pytest.fixture(scope="module")
def own_questions(tmp_path_factory) -> Path:
    """Six questions of a user's own, of which two share a picture, and one's picture is missing."""
    folder = tmp_path_factory.mktemp("own")
    ShapesRows("test")[0].images[0].save(folder / "a.png")
    ShapesRows("test")[1].images[0].save(folder / "b.png")
    rows = [
        {
            "id": "exact",
            "question": "What is at a1?",
            "image": "a.png",
            "answer": ["red star", "star"],
            "category": "x",
        },
        {"id": "option", "question": "What is at a2?", "image": "a.png", "answer": "B", "options": ["red", "blue"]},
        {
            "id": "yes_no",
            "question": "Are there more stars than circles?",
            "image": "b.png",
            "answer": "yes",
            "category": "x",
        },
        {"id": "number", "question": "How many stars are there?", "image": "b.png", "answer": 1000, "category": "x"},
        {"id": "missing", "question": "What is at a3?", "image": "none.png", "answer": "red"},
        {"id": "alone", "question": "How many?", "answer": "4", "match": "exact"},
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "own.jsonl"


CONCLUSIONS = {
    "exact": "**Red  star**.",
    "option": "It is blue",
    "yes_no": "Yes, it is",
    "number": "1,000 stars",
    "alone": "4.0",
}
"""Conclusions that are put in the place of what a small model answers."""


@pytest.fixture(scope="module")
def answered(own_questions, tmp_path_factory) -> Path:
    """The folder of a run in whose answers these conclusions were put."""
    folder = tmp_path_factory.mktemp("answered")
    main(["--benchmark", str(own_questions), "--output", str(folder), "--max_new_tokens", "8"])
    rows = read_rows(folder)
    assert [row["id"] for row in rows] == ["exact", "option", "yes_no", "number", "missing", "alone"]
    assert rows[4].keys() == {"id", "question", "images", "seed", "error", "answer", "match", "right", "category"}
    for row in rows:
        if "error" not in row:
            conclusion = CONCLUSIONS[row["id"]]
            row |= {"text": f"<CONCLUSION> {conclusion} </CONCLUSION>", "stages": {"CONCLUSION": conclusion}}
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_ones_own_questions_with_every_match(own_questions, answered, monkeypatch, capsys):
    """A second run loads no weights, and scores the answers as they stand: 4 of 6 are right, worked out by hand.

    By picture, the answers less 2/3 add up to 2/3, 2/3, -2/3 and -2/3.
    """
    monkeypatch.setattr(Mllama, "from_pretrained", lambda *_, **__: pytest.fail("the weights are loaded"))
    arguments = ["--benchmark", str(own_questions), "--output", str(answered), "--max_new_tokens", "8"]
    main([*arguments, "--checkpoint", "shapes"])
    rows, result = read_rows(answered), read_result(answered)
    assert [(row["match"], row["right"]) for row in rows] == [
        ("exact", True),
        ("option", True),
        ("yes_no", True),
        ("number", True),
        ("exact", False),
        ("exact", False),
    ]
    assert rows[0]["scored"] == "Red  star." and rows[0]["answer"] == ["red star", "star"]
    assert result["accuracy"]["all"] == {
        "questions": 6,
        "right": 4,
        "clusters": 4,
        "accuracy": pytest.approx(2 / 3),
        "standard_error": pytest.approx(0.1924501),  # sqrt(2/9 / 6)
        "clustered_standard_error": pytest.approx(0.2222222),  # sqrt(4 * 4/9) / 6
        "unanswered": 1,
    }
    assert result["accuracy"]["categories"].keys() == {"x"}
    assert result["accuracy"]["categories"]["x"]["right"] == 3
    printed = capsys.readouterr().out
    assert "1 of 6 questions has no answer, and counts as wrong" in printed and "clustered" in printed


@pytest.mark.slow
def test_a_corrected_answer_counts_without_asking_again(own_questions, answered, tmp_path, monkeypatch):
    monkeypatch.setattr(Mllama, "from_pretrained", lambda *_, **__: pytest.fail("the weights are loaded"))
    corrected = tmp_path / own_questions.name
    corrected.write_text(own_questions.read_text().replace('"answer": "yes"', '"answer": "no"'))
    main(["--benchmark", str(corrected), "--output", str(answered), "--max_new_tokens", "8"])
    assert [row["right"] for row in read_rows(answered)] == [True, True, False, True, False, False]
    assert read_result(answered)["accuracy"]["all"]["right"] == 3


def test_another_setting_is_refused(own_questions, tmp_path):
    arguments = ["--benchmark", str(own_questions), "--output", str(tmp_path)]
    (tmp_path / "answers.jsonl").write_text('{"id": 0, "question": "What?", "images": []}\n')
    (tmp_path / "answers.jsonl.settings.json").write_text('{"benchmark": "shapes"}')
    with pytest.raises(UserError, match=r'answers.jsonl was begun with benchmark = "shapes", which is "own.jsonl" now'):
        main(arguments)
    (tmp_path / "answers.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match="which says how it was begun, does not: name another output"):
        main(arguments)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_candidates", "3"], "--num_candidates needs a search"),
        (["--slots", "0"], "slots is 0; it must be at least 1"),
        (["--verifier_adapter", "none", "--compare", "greedy,stage_beam:2"], "which no search here asks: give --judge"),
        (["--verifier_adapter", "none", "--compare", "greedy,weighted_vote:2"], "no such folder|none is no folder"),
        (["--mesh.data", "0"], "mesh.data is 0"),
        (["--match", "fuzzy"], "match is 'fuzzy'; it must be one of exact, option, yes_no, number"),
        (["--match", "number"], "the right answer 'green' is not one number"),
        (["--judge_prompts", "none.yaml"], "none.yaml does not exist"),
        (["--output", "tests.txt"], "tests.txt/answers.jsonl cannot be written"),
        (["--format", "none"], "there is no stage format none"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests.txt").write_text("a file\n")
    with pytest.raises(UserError, match=message) as told:
        main(["--benchmark", "shapes", "--limit", "4", "--output", "run", *more])
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_what_is_required():
    with pytest.raises(UserError, match="--output"):
        main(["--benchmark", "shapes"])
    with pytest.raises(UserError, match="--benchmark"):
        main(["--output", "run"])
