"""Scores by VLMEvalKit's own code, of answers whose scores are worked out by hand."""

import fcntl
import sys
from pathlib import Path

import pandas
import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.benchmarks.kit_install import INSTALL_KIT, kit_fault
from llava_cot_jax.evaluation.benchmarks.kit_scores import score_predictions
from tests.evaluation.benchmark_files import planted, questions_of

assert kit_fault() is None, f"these tests need VLMEvalKit: {INSTALL_KIT}"


@pytest.fixture(autouse=True)
def variables_of_the_kit(monkeypatch):
    """Set environment variables by which the kit would match in another way, or write other files."""
    for name, value in {"VERBOSE": "1", "PRED_FORMAT": "json", "EVAL_FORMAT": "json", "PRINT_VANILLA": "1"}.items():
        monkeypatch.setenv(name, value)


def scored(name: str, folder, conclusions: list[str | None]) -> list[dict]:
    """Return the kit's first table for planted conclusions."""
    questions = questions_of(name, folder)
    scores = score_predictions(questions.benchmark, questions.table, planted(questions, folder, conclusions), None)
    assert (scores["scorer"], scores["pandas"]) == ("VLMEvalKit 0.0.20", pandas.__version__)
    assert scores["by"] == "exact matching"
    return scores["tables"]["accuracy"]


@pytest.mark.slow
def test_mmstar(tmp_path):
    """A letter, the text of an option that is asked as 7.0, and no answer: 2 of 4 are right, and 1 of 3 in math."""
    (row,) = scored("mmstar", tmp_path, ["I take the **A**", "It is 7.0", None, "A"])
    assert row == {"split": "none", "Overall": 0.5, "coarse perception": 1, "math": pytest.approx(1 / 3)}


@pytest.mark.slow
def test_mmbench_in_circles(tmp_path):
    """A question is right where all its rotations are: the first and the last of four, one in each ability.

    One wrong letter, or one answer that names no option, takes a whole question.
    """
    questions = questions_of("mmbench_dev_en_v11", tmp_path)
    answers = {5: "AB", 7: "ADCC", 11: "A?B", 12: "AB"}  # of 7, the last should be B
    assert [row.id for row in questions.rows[:2]] == [5, 1_000_005]
    conclusions = [answers[row.id % 1_000_000][row.id // 1_000_000] for row in questions.rows]
    before = set(Path("/tmp").glob("*.xlsx"))
    (row,) = scored("mmbench_dev_en_v11", tmp_path, conclusions)
    assert set(Path("/tmp").glob("*.xlsx")) == before  # the kit leaves one there
    assert row == {
        "split": "dev", "Overall": 0.5, "CP": 0.5, "RR": 0.5,
        "image_scene": 1, "image_style": 0, "physical_relation": 0.5,
    }  # fmt: skip


@pytest.mark.slow
def test_ai2d(tmp_path):
    (row,) = scored("ai2d", tmp_path, ["the root", "hare", "B or A"])
    assert row == {"split": "none", "Overall": pytest.approx(2 / 3), "foodChainsWebs": 1, "partsOfA": 0.5}


@pytest.mark.slow
def test_hallusionbench_by_figure_and_question(tmp_path):
    """Wrong are the second of 7 answers, and the last, which says neither; the row without an image is not asked.

    Of 4 figures, those with all answers right are VD 2 and VS 1; of 4 questions, VD 0 and VS 0.
    """
    conclusions = ["Yes", "Yes", "no, it is not", "**Yes**", "Yes.", "No", "It may."]
    table = {row.pop("split"): row for row in scored("hallusionbench", tmp_path, conclusions)}
    assert table == {
        "Overall": {"aAcc": pytest.approx(500 / 7), "fAcc": 50, "qAcc": 50},
        "VD": {"aAcc": 75, "fAcc": 50, "qAcc": 50},
        "VD_illusion": {"aAcc": 75, "fAcc": 50, "qAcc": 50},
        "VS": {"aAcc": pytest.approx(200 / 3), "fAcc": 50, "qAcc": 50},
        "VS_chart": {"aAcc": pytest.approx(200 / 3), "fAcc": 50, "qAcc": 50},
    }


def test_another_version_of_the_kit(tmp_path, monkeypatch):
    (tmp_path / "ms_vlmeval-0.0.19.dist-info").mkdir()
    (tmp_path / "ms_vlmeval-0.0.19.dist-info" / "METADATA").write_text("Name: ms-vlmeval\nVersion: 0.0.19\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert kit_fault() == "VLMEvalKit 0.0.20 is needed, and it is 0.0.19"


@pytest.mark.slow
def test_predictions_that_the_kit_cannot_score(tmp_path):
    """The kit's own words are told in one line, and the scores of before stay."""
    questions = questions_of("mmstar", tmp_path)
    predictions = planted(questions, tmp_path, ["A", "B", "C", "D"])
    (predictions.parent / "scored").mkdir()
    (predictions.parent / ".scoring-left").mkdir()
    with pytest.raises(UserError, match=r"VLMEvalKit 0.0.20 cannot score the predictions: AssertionError") as end:
        score_predictions(questions.benchmark, questions.table.iloc[:1], predictions, None)
    assert "\n" not in str(end.value)
    left = sorted(path.name for path in predictions.parent.glob("[!.]*"))
    assert left == ["kit.log", "llava_cot_jax_MMStar.xlsx", "scored"]
    assert str(end.value).endswith(f"({predictions.parent}/kit.log says more)")
    assert "Traceback" in (predictions.parent / "kit.log").read_text()
    assert not list(predictions.parent.glob(".scoring-*"))


@pytest.mark.slow
def test_two_scorings_at_a_time(tmp_path):
    """A second one leaves the first alone; a later one tidies up, and others can read what they could before."""
    questions = questions_of("ai2d", tmp_path)
    predictions = planted(questions, tmp_path, ["B", "C", "A"])
    folder = predictions.parent
    folder.chmod(0o755)
    (folder / ".scoring-first").mkdir()
    (folder / "kit.log").touch()  # of a scoring that failed
    with (folder / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="vlmevalkit is being scored by another process: wait for it"):
            score_predictions(questions.benchmark, questions.table, predictions, None)
    assert (folder / ".scoring-first").exists()
    score_predictions(questions.benchmark, questions.table, predictions, None)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "llava_cot_jax_AI2D_TEST.xlsx", "scored"]
    assert (folder / "scored").stat().st_mode & 0o777 == 0o755
