"""Lines of a comparison: accuracy at equal FLOPs against numpy, and images that several questions share."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from llava_cot_jax.evaluation.comparison.lines import MethodResult, comparison_lines, equal_flops_lines, pair_lines
from llava_cot_jax.evaluation.comparison.plot import draw_comparison
from llava_cot_jax.evaluation.comparison.tables import comparison_tables, print_comparison
from llava_cot_jax.evaluation.statistics import estimate_accuracy

COUNT = 40
IMAGES = np.repeat(range(COUNT // 2), 2).tolist()


def result(name: str, flops: int, share: float, seed: int) -> MethodResult:
    """A method with random answers, two questions an image."""
    right = np.random.default_rng(seed).random(COUNT) < share
    rows = [
        {
            "id": i,
            "images": [f"{IMAGES[i]}.png"],
            "right": bool(right[i]),
            "flops": {"prompt": flops // 4, "rest": flops * 3 // 4},
        }
        for i in range(COUNT)
    ]
    return MethodResult(name, name.partition(":")[0], rows, {})


VOTES = [result("vote:1", 100, 0.4, 0), result("vote:4", 400, 0.6, 1), result("vote:8", 1000, 0.7, 2)]


@pytest.mark.parametrize("flops", [100, 200, 400, 640, 1000])
def test_between_two_numbers_of_candidates(flops):
    """Linear in the logarithm of FLOPs; the error of a mean of two scores is that of any scores."""
    other = result("beam", flops, 0.8, 3)
    (line,) = equal_flops_lines([*VOTES, other])
    measured = np.log([each.flops for each in VOTES])
    shares = [np.mean(each.right) for each in VOTES]
    assert line["accuracy"] == pytest.approx(np.interp(np.log(flops), measured, shares))
    assert line["difference"] == pytest.approx(np.mean(other.right) - line["accuracy"])
    scores = [
        right - np.interp(np.log(flops), measured, [each.right[i] for each in VOTES])
        for i, right in enumerate(other.right)
    ]
    by_image = np.reshape(np.array(scores) - np.mean(scores), (-1, 2)).sum(axis=1)
    assert line["standard_error"] == pytest.approx(np.sqrt(np.square(by_image).sum()) / COUNT)


@pytest.mark.parametrize("flops", [96, 1004])
def test_never_outside_what_was_measured(flops):
    (line,) = equal_flops_lines([*VOTES, result("beam", flops, 0.8, 3)])
    assert [line[key] for key in ("between", "accuracy", "difference", "standard_error", "interval")] == [None] * 5


def test_families_of_one_method_say_nothing_and_none_of_itself():
    assert equal_flops_lines(VOTES) == []
    assert equal_flops_lines([VOTES[0], result("beam", 200, 0.8, 3)]) == []


def test_questions_without_an_answer_count_as_wrong_and_take_no_flops():
    rows = [{"id": i, "images": [], "right": False, "error": "no picture"} for i in range(COUNT)]
    lost = MethodResult("lost", "lost", rows, {})
    assert lost.flops is None and equal_flops_lines([*VOTES, lost]) == []
    (pair,) = pair_lines([VOTES[0], lost])
    assert (pair["only_first"], pair["only_second"]) == (sum(VOTES[0].right), 0)


def test_pairs_are_clustered_by_image():
    """Against a method that is always wrong, the difference is the accuracy, with its error."""
    wrong = MethodResult("wrong", "wrong", [row | {"right": False} for row in VOTES[1].rows], {})
    (pair,) = pair_lines([VOTES[1], wrong])
    expected = estimate_accuracy(VOTES[1].right, IMAGES)
    assert (pair["clusters"], pair["difference"]) == (COUNT // 2, pytest.approx(expected.accuracy))
    assert pair["standard_error"] == pytest.approx(expected.clustered_standard_error)


ABOUT = {"kind": "about", "benchmark": "mine", "questions": COUNT, "run": {"checkpoint": "shapes", "seed": 0}}

UNTIMED = {"derived": False, "seconds_per_question": None}


def named(each: MethodResult, **about) -> MethodResult:
    rows = [row | {"category": None, "match": "exact", "tokens": {"candidates": 12345}} for row in each.rows]
    return MethodResult(f"{each.name}/log_probability", each.family, rows, UNTIMED | {"num_candidates": 2} | about)


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_folds_names_and_cuts_no_number(width):
    lines = [ABOUT | {"environments": []}, *comparison_lines([*map(named, VOTES), named(result("beam", 200, 0.8, 3))])]
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, no_color=True)
    print_comparison(lines, console)
    text = screen.getvalue()
    assert "…" not in text
    drawn = [line for line in re.sub(r"\x1b[^m]*m", "", text).splitlines() if line.startswith(("│", "┃", "┏"))]
    assert drawn and max(map(len, drawn)) <= 80
    for table in comparison_tables(lines):
        for row in table.rows:
            assert all(cell in text for cell in row[table.names :])


def test_a_comparison_without_any_answer_is_printed_and_drawn(tmp_path):
    rows = [
        {"id": i, "images": [], "right": False, "error": "none", "category": None, "match": "exact"} for i in range(2)
    ]
    lost = [MethodResult(name, name, rows, UNTIMED | {"num_candidates": None}) for name in ("a", "b")]
    lines = [ABOUT | {"environments": []}, *comparison_lines(lost)]
    screen = io.StringIO()
    print_comparison(lines, Console(file=screen))
    assert "count as wrong" in screen.getvalue()
    assert all(path.stat().st_size > 1000 for path in draw_comparison(lines, tmp_path / "plot").values())


def test_the_plot_ends_where_shares_do(tmp_path):
    """Where all methods are right on all questions, whose differences alone would be drawn around 100%."""
    right = [MethodResult(each.name, each.family, [row | {"right": True} for row in each.rows], {}) for each in VOTES]
    lines = [ABOUT | {"environments": []}, *comparison_lines([named(each) for each in right])]
    drawn = draw_comparison(lines, tmp_path / "plot")["svg"].read_text()
    told = [float(share) for share in re.findall(r"<!-- ([\d.]+)% -->", drawn)]
    assert told and max(told) <= 102
