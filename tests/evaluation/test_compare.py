"""``evaluate --compare``: the same files after a kill and from two processes, answers as of direct runs, and errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from base64 import b64decode
from pathlib import Path
from xml.etree import ElementTree

import pytest
from jsonargparse import Namespace
from PIL import Image

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluate import main
from llava_cot_jax.evaluation import plotting
from llava_cot_jax.evaluation.comparison.derived import derived_row
from llava_cot_jax.evaluation.comparison.methods import Method
from llava_cot_jax.evaluation.matching import RightAnswer
from llava_cot_jax.model.checkpoint.folder import read_config, resolve_checkpoint
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.paths import BUNDLED_MODEL
from llava_cot_jax.search.options import SEARCH_OPTIONS
from tests.browser import open_browser, opened
from tests.processes import free_port, xla_flags

COUNT = 5
"""Number of questions, which fill no whole number of batches."""

METHODS = ("sample", "majority_vote:2", "sentence_beam:2/log_probability")

RUNS = ("majority_vote-2", "sentence_beam-2-log_probability")
"""Folders of what is run for these methods."""

QUESTIONS = ["--benchmark", "shapes", "--limit", str(COUNT), "--slots", "2", "--max_new_tokens", "90"]

ENVIRONMENT = os.environ | {"XLA_FLAGS": xla_flags(devices=1), "JAX_PLATFORMS": "cpu"}


def command(output: Path, *more: str) -> list[str]:
    arguments = [*QUESTIONS, "--compare", ",".join(METHODS), "--output", str(output), *more]
    return [sys.executable, "-m", "llava_cot_jax.evaluate", *arguments]


def lines_of(folder: Path) -> list[dict]:
    """Lines of the comparison without times, which are never the same."""
    lines = [json.loads(line) for line in (folder / "comparison.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_per_question"} for line in lines]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a comparison that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(command(folder), env=ENVIRONMENT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folder of a comparison that was killed in the last of its runs, between two batches."""
    folder = tmp_path_factory.mktemp("killed")
    last = folder / RUNS[-1] / "answers.jsonl"
    process = subprocess.Popen(command(folder), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not last.exists() or not last.read_bytes().count(b"\n"):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.read_bytes().count(b"\n") < COUNT and not (folder / "comparison.jsonl").exists()
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    for run in RUNS:
        assert (folder / run / "answers.jsonl").read_bytes() == (whole / run / "answers.jsonl").read_bytes(), run
    assert lines_of(folder) == lines_of(whole)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_killed_comparison_goes_on_and_asks_nothing_twice(killed, whole, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "restarted")
    kept = sum(len((folder / run / "answers.jsonl").read_bytes().split(b"\n")) - 1 for run in RUNS)
    ended = subprocess.run(command(folder), env=ENVIRONMENT, capture_output=True, text=True, check=True)
    told = [line.split()[1] for line in ended.stdout.splitlines() if line.startswith("comparing ")]
    assert told == [f"{done}/{COUNT * len(RUNS)}" for done in range(kept + 1, COUNT * len(RUNS) + 1)]
    assert_same(folder, whole)
    seconds = [json.loads((folder / run / "seconds.json").read_text()) for run in RUNS]
    assert all(COUNT - 2 <= each["questions"] <= COUNT and each["seconds"] > 0 for each in seconds)


@pytest.mark.slow
def test_two_processes_divide_a_comparison(killed, whole, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "divided")
    first = folder / RUNS[0] / "answers.jsonl"
    first.write_bytes(b"".join(first.read_bytes().splitlines(True)[::2]))
    hosts = ["--hosts.coordinator", f"localhost:{free_port()}", "--hosts.count", "2", "--hosts.index"]
    both = [
        subprocess.Popen(command(folder, *hosts, index), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for index in ("0", "1")
    ]
    printed = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "Pairs: first less second" in printed[0] and not printed[1]
    assert_same(folder, whole)


@pytest.mark.slow
def test_what_the_files_say(whole):
    """Accuracies and differences are found anew from the answers."""
    lines = lines_of(whole)
    about, methods = lines[0], {line["method"]: line for line in lines if line["kind"] == "method"}
    assert (about["kind"], about["questions"], about["run"]["checkpoint"], about["run"]["seed"]) == (
        "about",
        5,
        "shapes",
        0,
    )
    assert [environment["device"] for environment in about["environments"]] == ["1 x cpu"]
    assert list(methods) == list(METHODS)
    assert [methods[name]["derived"] for name in METHODS] == [True, False, False]
    for name, run in zip(METHODS[1:], RUNS, strict=True):
        rows = rows_of(whole / run)
        assert methods[name]["right"] == sum(row["right"] for row in rows)
        flops = sum(sum(row["flops"].values()) for row in rows) / COUNT
        assert methods[name]["flops_per_question"]["total"] == pytest.approx(flops)
    pairs = {(line["first"], line["second"]): line for line in lines if line["kind"] == "pair"}
    assert len(pairs) == 3 and all(line["pairs"] == 3 for line in pairs.values())
    for (first, second), line in pairs.items():
        assert line["difference"] == pytest.approx(methods[first]["accuracy"] - methods[second]["accuracy"])
        assert line["only_first"] - line["only_second"] == methods[first]["right"] - methods[second]["right"]
        assert line["holm_p_value"] >= line["p_value"]


@pytest.mark.slow
def test_the_plot_names_every_family(whole):
    with Image.open(whole / "comparison.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    drawn = (whole / "comparison.svg").read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    for family in ("sample", "majority_vote", "sentence_beam/log_probability"):
        assert f"<!-- {family} -->" in drawn


@pytest.mark.slow
def test_a_finished_comparison_loads_no_weights(whole, tmp_path, monkeypatch, browser):
    """A plot that was drawn of the same lines is the same file, and the page has it, the tables and the last method."""
    folder = shutil.copytree(whole, tmp_path / "again")
    (folder / "comparison.jsonl").unlink()
    monkeypatch.setattr(Mllama, "from_pretrained", lambda *_, **__: pytest.fail("the weights are loaded"))
    page = ["--page", str(folder / "page.html")]
    main([*QUESTIONS, "--compare", ",".join(METHODS), "--output", str(folder), "--checkpoint", "shapes", *page])
    with opened(browser, folder / "page.html") as found:
        shown = found.page
        assert shown.locator(".table").count() == 2 and METHODS[-1] in shown.locator("dl.facts").first.inner_text()
        first = shown.locator(".table").first.inner_text()
        for line in lines_of(folder):
            if line["kind"] == "method":
                assert f"{line['method']}\t{line['accuracy']:.1%} ± {line['standard_error']:.1%}" in first
        conclusions = [row["conclusion"] for row in rows_of(folder / RUNS[-1])]
        assert shown.locator(".answer").all_inner_texts() == conclusions
        drawn = "one => one.decode().then(() => [one.naturalWidth, one.src])"
        width, source = shown.locator(".plot img").evaluate(drawn)
        assert width > 500 and b64decode(source.partition(",")[2]) == (folder / "comparison.svg").read_bytes()
    assert (folder / "comparison.svg").read_bytes() == (whole / "comparison.svg").read_bytes()
    assert (folder / "comparison.jsonl").read_bytes() == (whole / "comparison.jsonl").read_bytes()
    assert (folder / "comparison.png").read_bytes() == (whole / "comparison.png").read_bytes()


NESTED = ("best_of_n:2/log_probability", "weighted_vote:3", "best_of_n:3/verifier")
"""Methods that are derived from four candidates with scores of the verifier; the last two run the same program."""


@pytest.mark.slow
def test_derived_answers_are_those_of_direct_runs(tmp_path):
    """Texts, winners, tokens and FLOPs are the same; log-probabilities and scores are, but for rounding.

    A direct run has other shapes, in which sums are rounded otherwise. The log-probabilities of some 60 tokens, each of
    which is rounded like the logits that it is the difference of, add up to an error of 1e-4 at most.
    """
    methods = ",".join([*NESTED, "weighted_vote:4", "best_of_n:3/oracle"])
    main([*QUESTIONS, "--compare", methods, "--output", str(tmp_path / "all")])
    assert [path.name for path in (tmp_path / "all").iterdir() if path.is_dir()] == ["best_of_n-4-verifier"]
    lines = {line["method"]: line for line in lines_of(tmp_path / "all") if line["kind"] == "method"}
    options = Namespace({**dict.fromkeys(SEARCH_OPTIONS), "max_new_tokens": 90, "format": "llava_cot"})
    config = read_config(resolve_checkpoint(BUNDLED_MODEL))
    for name in NESTED:
        search, _, rest = name.partition(":")
        count, _, judge = rest.partition("/")
        given = ["--num_candidates", count, *(["--judge", judge] if judge else [])]
        main([*QUESTIONS, "--search", search, *given, "--output", str(tmp_path / name.replace("/", "-"))])
        direct = rows_of(tmp_path / name.replace("/", "-"))
        result = json.loads((tmp_path / name.replace("/", "-") / "result.json").read_text())
        for key in ("tokens_per_question", "flops_per_question"):
            assert lines[name][key] == result[key]
        assert lines[name]["right"] == result["accuracy"]["all"]["right"] and lines[name]["derived"]
        for one, row in zip(direct, rows_of(tmp_path / "all" / "best_of_n-4-verifier"), strict=True):
            assert_same_row(one, derived_row(row, Method.read(name, options), config, RightAnswer(("unused",))))
    rows, oracle = rows_of(tmp_path / "all" / "best_of_n-4-verifier"), lines["best_of_n:3/oracle"]
    drawn = [[each["text"] for each in row["trace"]["stages"][0]["candidates"][:3]] for row in rows]
    ends = [f"<CONCLUSION> {row['answer']} </CONCLUSION>" for row in rows]
    expected = sum(any(text.endswith(end) for text in texts) for texts, end in zip(drawn, ends, strict=True))
    assert oracle["right"] == expected >= lines["best_of_n:3/verifier"]["right"]
    assert "verifier_probes" not in {name for name, flops in oracle["flops_per_question"].items() if flops}


def assert_same_row(direct: dict, derived: dict) -> None:
    """What is compared with the right answer is found from the text anew, wherever a row comes from."""
    for key in direct.keys() - {"trace", "scored", "right"}:
        assert direct[key] == derived[key], key
    ((one,), (other,)) = direct["trace"].pop("stages"), derived["trace"].pop("stages")
    assert direct["trace"] == derived["trace"]
    assert one["winner"] == other["winner"] and len(one["candidates"]) == len(other["candidates"])
    for a, b in zip(one["candidates"], other["candidates"], strict=True):
        for key in ("log_prob", "mean_log_prob", "score", "other_probability"):
            x, y = a.pop(key), b.pop(key)
            assert x == y or x == pytest.approx(y, rel=1e-3, abs=1e-4), key
        assert a == b


VOTE = ["--search", "majority_vote", "--num_candidates", "2", "--checkpoint", "shapes"]
"""Options of a single evaluation like the first run of the comparison."""


def against(whole: Path, folder: Path, other: Path) -> None:
    """Compare the answers of the first run, of which all are there, with others."""
    shutil.copytree(whole / RUNS[0], folder)
    main([*QUESTIONS, *VOTE, "--output", str(folder), "--against", str(other)])


@pytest.mark.slow
def test_an_evaluation_against_another_one(whole, tmp_path, monkeypatch, capsys):
    """Three questions of both are compared, of which this evaluation alone has two right; nothing is asked."""
    monkeypatch.setattr(Mllama, "from_pretrained", lambda *_, **__: pytest.fail("the weights are loaded"))
    rows, own = rows_of(whole / RUNS[1]), rows_of(whole / RUNS[0])
    changed = [
        row | {"scored": row["answer"] if own_row["right"] and i == 0 else "none", "seed": row["seed"] + (i == 1)}
        for i, (row, own_row) in enumerate(zip(rows, own, strict=True))
    ]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in reversed(changed[:3])))
    against(whole, tmp_path / "own", other)
    (pair,) = [line for line in lines_of(tmp_path / "own") if line["kind"] == "pair"]
    lost = sum(row["right"] for row in own[1:3])
    assert lost and (pair["questions"], pair["only_first"], pair["only_second"]) == (3, lost, 0)
    assert pair["second"] == str(other)
    printed = capsys.readouterr().out
    assert f"2 questions of this evaluation have no answer in {other}" in printed
    assert f"1 of 3 questions have another seed in {other}" in printed


AGAINST = {
    "another question": ({"question": "Why?"}, "other.jsonl has another question for the id 'test-0' than this"),
    "another image": ({"images": ["x.png"]}, "other.jsonl has another image for the id 'test-0' than this"),
    "another right answer": ({"answer": "none"}, "other.jsonl has another right answer for the id 'test-0' than this"),
    "none in common": ({"id": "x"}, "other.jsonl has no answer to any question of this evaluation"),
    "no costs": ({"flops": None}, "other.jsonl, line 1 has no flops: --against takes answers.jsonl of another"),
    "a list as id": ({"id": []}, "other.jsonl, line 1: id is .*a list; it must be a text or a whole number"),
    "no evaluation": ({"right": None}, "other.jsonl, line 1 has no right: --against takes answers.jsonl of another"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AGAINST)
def test_another_evaluation_that_cannot_be_compared(whole, tmp_path, name):
    change, message = AGAINST[name]
    row = {key: value for key, value in (rows_of(whole / RUNS[1])[0] | change).items() if value is not None}
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message) as told:
        against(whole, tmp_path / "own", tmp_path / "other.jsonl")
    assert "\n" not in str(told.value)


def test_an_evaluation_of_another_benchmark(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"id": "test-0", "question": "?", "images": [], "right": true}\n')
    (tmp_path / "other.jsonl.settings.json").write_text('{"benchmark": "mine.jsonl"}')
    with pytest.raises(UserError, match=r"has answers to the benchmark mine.jsonl, and this evaluation is of shapes$"):
        main([*QUESTIONS, "--output", str(tmp_path / "own"), "--against", str(tmp_path / "other.jsonl")])
    assert not (tmp_path / "own").exists()


REFUSED = {
    "an unknown method": (
        ["greedy,majority:4"],
        r"has 'majority:4', but there is no such method .did you mean majority_",
    ),
    "nothing": ([""], "has '', but there is no such method"),
    "no candidates": (["greedy,best_of_n:0"], "has best_of_n:0: num_candidates is 0; it must be at least 1"),
    "half a candidate": (
        ["greedy,best_of_n:1.5"],
        "has best_of_n:1.5: the number of candidates is '1.5'; it must be a",
    ),
    "a greedy number": (["greedy:4,sample"], "has greedy:4: greedy takes no number of candidates"),
    "rounds": (["greedy,retracing:4"], "has retracing:4: retracing takes no number of candidates"),
    "an unknown scorer": (["greedy,best_of_n:2/best"], "has best_of_n:2/best: the scorer is 'best'; it must be one of"),
    "a judging oracle": (
        ["greedy,stage_beam:2/oracle"],
        "has stage_beam:2/oracle: the scorer is 'oracle'; it must be one of .*, or oracle of best_of_n",
    ),
    "a scored vote": (
        ["greedy,majority_vote:2/verifier"],
        "has majority_vote:2/verifier: majority_vote takes no scorer",
    ),
    "a judged vote": (
        ["greedy,weighted_vote:2/token"],
        "has weighted_vote:2/token: scorer is .* a weighted vote needs",
    ),
    "one method": (["greedy"], "has one method, greedy: give two or more, with commas between them"),
    "the same twice": (["best_of_n:8/token,best_of_n"], "--compare has best_of_n:8/token twice"),
    "an option for none": (
        ["greedy,sample", "--threshold", "0.4"],
        "--threshold has no meaning for any method of --comp",
    ),
    "out of range": (["greedy,sample", "--top_p", "2"], "--compare has sample: top_p is 2"),
    "a search": (["greedy,sample", "--search", "greedy"], "--search has no meaning with --compare"),
    "a page": (["greedy,sample", "--page", "tests"], "tests cannot be written: it is a folder; name a file"),
    "another's scores": (
        ["greedy,sample", "--benchmark", "mmstar", "--data", "x.tsv"],
        "--compare needs questions that are right or wrong one by one, not --benchmark mmstar",
    ),
    "another evaluation": (["greedy,sample", "--against", "x.jsonl"], "--against has no meaning with --compare"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_cannot_be_compared(tmp_path, name):
    given, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as told:
        main(["--benchmark", "shapes", "--limit", "4", "--output", str(tmp_path / "run"), "--compare", *given])
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("search", [["--compare", "greedy,sample"], ["--search", "greedy"]])
def test_without_any_answer_the_result_is_written_and_the_exit_code_is_1(tmp_path, search):
    row = {"id": 1, "question": "What do you see?", "image": "none.png", "answer": "a star"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    asked = ["--benchmark", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "run"), "--checkpoint", "shapes"]
    with pytest.raises(UserError, match=r"^none of 1 questions has an answer .*none.png does not exist") as told:
        main([*asked, *search])
    assert told.value.exit_code == 1
    assert any((tmp_path / "run" / name).exists() for name in ("comparison.png", "result.json"))


def test_a_wrong_command_ends_with_one_line_and_code_2(tmp_path):
    ended = subprocess.run(
        [*command(tmp_path / "run")[:3], *QUESTIONS, "--output", "run", "--against", "none.jsonl"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1 and "none.jsonl does not exist" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_without_matplotlib_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(plotting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"matplotlib, which is not installed: pip install 'llava-cot-jax\[plots\]'"):
        main([*QUESTIONS, "--output", str(tmp_path / "run"), "--compare", "greedy,sample"])
    assert not (tmp_path / "run").exists()
