"""Lines of a comparison: accuracy at equal FLOPs against numpy, and images that several questions share."""

import numpy as np
import pytest

from llava_cot_jax.evaluation.comparison.lines import MethodResult, equal_flops_lines, pair_lines
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
