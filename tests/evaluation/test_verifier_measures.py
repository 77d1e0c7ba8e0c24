"""Measures of a verifier against scipy, statsmodels and numpy, which compute them anew from the lines of a file."""

import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import statsmodels.api
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binom, spearmanr

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluate import main
from llava_cot_jax.evaluation.verifier import measures
from llava_cot_jax.evaluation.verifier.measures import calibration, differences, measure_verifier, rank_correlation
from llava_cot_jax.evaluation.verifier.values import ScoredValues, ValuedText, read_values
from tests.processes import ROOT
from tests.test_quick import run

STAGES, CONTINUATIONS = ("CAPTION", "CONCLUSION"), 8


def candidate(text: str, value: float, score: float | None, log_prob: float = -1.0, other: float | None = 0.0) -> dict:
    told = {"text": text, "value": value, "right": 0, "continuations": 0, "mean_log_prob": log_prob}
    return told | {"score": score, "other_probability": other}


def answer(text: str, right: bool, score: float | None, other: float | None = 0.0) -> dict:
    return {"text": text, "right": right, "score": score, "other_probability": other}


def row(identifier: int, stages: dict[str, list[dict]], answers: list[dict], image: str | None = None) -> dict:
    told = [{"stage": n, "before": "<", "winner": 0, "candidates": each} for n, each in stages.items()]
    question = {"id": identifier, "question": "How many?", "images": [image or f"{identifier}.png"], "answer": "two"}
    how = {"match": "exact", "seed": 3, "format": "llava_cot"}
    return question | how | {"stages": told, "answers": answers}


def written(folder: Path, rows: list[dict]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "values.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(folder)


def drawn(seed: int, count: int = 40) -> list[dict]:
    """Questions, two or three an image, with five candidates of each kind, of which some share scores and values."""
    rows = []
    for i in range(count):
        draw = np.random.default_rng([0, i])  # the same candidates for every seed
        scores = np.random.default_rng([seed, i, 1]).integers(21, size=(3, 5)) / 20
        value = draw.integers(CONTINUATIONS + 1, size=5) / CONTINUATIONS
        right, log_probs = draw.integers(2, size=(2, 5)), -draw.random((2, 5))
        values = {"CAPTION": value, "CONCLUSION": right[0].astype(float)}
        stages = {
            name: [
                candidate(f"{name}{j}", values[name][j], scores[s, j], log_probs[s, j], scores[s, j] / 50)
                for j in range(5)
            ]
            for s, name in enumerate(STAGES)
        }
        answers = [answer(f"answer{j}", bool(right[1, j]), scores[2, j], 0.01 * j) for j in range(5)]
        rows.append(row(i, stages, answers, f"{i * 2 // 5}.png"))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("values")


@pytest.fixture(scope="module")
def before(folder) -> ScoredValues:
    return read_values(written(folder / "before", drawn(1)))


@pytest.fixture(scope="module")
def after(folder) -> ScoredValues:
    return read_values(written(folder / "after", drawn(2)))


def sets_of(rows: list[dict], part: str) -> list[tuple[str, np.ndarray, list[dict]]]:
    """Image, values, and candidates of each question."""
    if part == "whole answers":
        found = [(each["images"][0], each["answers"]) for each in rows]
        return [(image, np.array([float(a["right"]) for a in answers]), answers) for image, answers in found]
    found = [(each["images"][0], each["stages"][STAGES.index(part)]["candidates"]) for each in rows]
    return [(image, np.array([c["value"] for c in candidates]), candidates) for image, candidates in found]


def column(candidates: list[dict], key: str) -> np.ndarray:
    return np.array([each[key] for each in candidates])


def clustered_mean(told: list[tuple[str, float]]) -> tuple[float, float, int]:
    """Mean and standard error of values with their images, as a regression with a covariance robust to these."""
    values, images = np.array([value for _, value in told]), [image for image, _ in told]
    groups = np.unique(images, return_inverse=True)[1]
    fit = statsmodels.api.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    return fit.params[0], fit.bse[0], len(values)


def pairs_of(image: str, values: np.ndarray, scores: np.ndarray, least: float) -> list[tuple[str, float]]:
    pairs = itertools.permutations(range(len(values)), 2)  # the better one first
    return [(image, (1 + np.sign(scores[i] - scores[j])) / 2) for i, j in pairs if values[i] - values[j] >= least]


def anew(rows: list[dict], part: str, key: str = "score") -> dict[str, list[tuple[str, float]]]:
    """What each mean is taken of, with the images."""
    told: dict[str, list[tuple[str, float]]] = {
        name: [] for name in ("rank_correlation", "chosen_value", "random_value")
    }
    told |= {name: [] for name in ("best_value", "clear_pairs", "all_pairs")}
    for image, values, candidates in sets_of(rows, part):
        scores = column(candidates, key)
        if np.ptp(values):
            told["rank_correlation"] += [(image, spearmanr(scores, values).statistic)]
        told["clear_pairs"] += pairs_of(image, values, scores, 0.35)
        told["all_pairs"] += pairs_of(image, values, scores, 1e-6)
        told["chosen_value"] += [(image, values[scores == scores.max()].mean())]
        told["random_value"] += [(image, values.mean())]
        told["best_value"] += [(image, values.max())]
    less = zip(told["chosen_value"], told["random_value"], strict=True)
    return told | {"chosen_less_random": [(image, chosen - random) for (image, chosen), (_, random) in less]}


@pytest.mark.parametrize("part", [*STAGES, "whole answers"])
def test_the_means_and_their_errors(part, before):
    found, rows = measure_verifier(before)[part], drawn(1)
    expected = anew(rows, part)
    if part in STAGES:
        expected |= {
            f"{name}_by_log_prob": told for name, told in anew(rows, part, "mean_log_prob").items() if "pairs" in name
        }
    for name, told in expected.items():
        estimate = found[name]
        assert (estimate["mean"], estimate["standard_error"], estimate["count"]) == pytest.approx(clustered_mean(told))
        assert estimate["clusters"] == len({image for image, _ in told}) <= estimate["questions"] <= 40
    assert (found["questions"], found["candidates"]) == (40, 200)
    assert (part in STAGES) == ("clear_pairs_by_log_prob" in found)
    other = [each["other_probability"] for _, _, candidates in sets_of(rows, part) for each in candidates]
    assert found["other_probability"]["mean"] == pytest.approx(np.mean(other))
    assert found["other_probability"]["percentile_95"] == pytest.approx(np.percentile(other, 95))


def test_whole_answers_that_were_sampled_have_log_probabilities(tmp_path):
    rows = drawn(1)
    for each in rows:
        for told, stage in zip(each["answers"], each["stages"][0]["candidates"], strict=True):
            told["mean_log_prob"] = stage["mean_log_prob"]
    found = measure_verifier(read_values(written(tmp_path, rows)))["whole answers"]
    for name in ("clear_pairs", "all_pairs"):
        estimate, expected = found[f"{name}_by_log_prob"], anew(rows, "whole answers", "mean_log_prob")[name]
        assert (estimate["mean"], estimate["standard_error"], estimate["count"]) == pytest.approx(
            clustered_mean(expected)
        )


def test_calibration(before):
    """Bins as numpy's histogram has them; the Brier score over every continuation, right or wrong."""
    candidates = [each for _, _, found in sets_of(drawn(1), "CAPTION") for each in found]
    scores, values = column(candidates, "score"), column(candidates, "value")
    found = measure_verifier(before)["CAPTION"]["calibration"]
    edges = np.arange(11) / 10
    counts = np.histogram(scores, edges)[0]
    assert [(each["from"], each["to"]) for each in found["bins"]] == list(itertools.pairwise(edges))
    assert [each["candidates"] for each in found["bins"]] == counts.tolist()
    sums = [np.histogram(scores, edges, weights=each)[0] for each in (scores, values)]
    assert [each["mean_score"] for each in found["bins"]] == pytest.approx((sums[0] / counts).tolist())
    assert [each["mean_value"] for each in found["bins"]] == pytest.approx((sums[1] / counts).tolist())
    assert found["expected_calibration_error"] == pytest.approx(np.abs(sums[0] - sums[1]).sum() / len(scores))
    right = np.round(values * CONTINUATIONS).astype(int)
    outcomes = np.arange(CONTINUATIONS) < right[:, None]
    assert found["brier_score"] == pytest.approx(np.square(scores[:, None] - outcomes).mean())


NUMBERS = st.lists(st.tuples(st.integers(0, 6), st.integers(-3, 3)), min_size=2, max_size=9)


@settings(max_examples=80, deadline=None)
@given(NUMBERS)
def test_rank_correlation_is_that_of_scipy(pairs):
    first, second = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert rank_correlation(first, second) == 0
    else:
        assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)


TEXTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 10)), min_size=1, max_size=6)


def measured(folder: Path, questions: list[list[tuple[float, float]]]) -> dict:
    sets = [[candidate(f"c{j}", *each) for j, each in enumerate(question)] for question in questions]
    rows = [row(i, {"CAPTION": each}, []) for i, each in enumerate(sets)]
    return measure_verifier(read_values(written(folder, rows)))["CAPTION"]


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_what_every_scorer_must_satisfy(tmp_path_factory, questions):
    """A scorer turned round is wrong where it was right; the values themselves order all pairs and choose the best."""
    folder = tmp_path_factory.getbasetemp() / "any_scorer"
    scored = [[(value / 8, score / 10) for value, score in each] for each in questions]
    found = measured(folder, scored)
    turned = measured(folder, [[(value, 1 - score) for value, score in each] for each in scored])
    perfect = measured(folder, [[(value, value) for value, _ in each] for each in scored])
    cubed = measured(folder, [[(value, score**3) for value, score in each] for each in scored])
    for name in ("clear_pairs", "all_pairs", "rank_correlation"):
        if found[name] is None:
            assert turned[name] is perfect[name] is None
            continue
        right = 1 if "pairs" in name else 0
        assert found[name]["mean"] == pytest.approx(right - turned[name]["mean"])
        assert perfect[name]["mean"] == pytest.approx(1)
    assert perfect["chosen_value"] == perfect["best_value"]
    assert (
        found["random_value"]["mean"] - 1e-9 <= found["best_value"]["mean"]
        and perfect["chosen_less_random"]["mean"] >= -1e-9
    )
    for name in ("clear_pairs", "all_pairs", "rank_correlation", "chosen_value"):
        assert cubed[name] == found[name]  # the order of scores alone counts


def test_by_hand(tmp_path):
    """Of three texts, one was drawn twice; a difference of 0.35 is clear, though it is rounded below that."""
    drawn_twice = [candidate("a", 0.48, 0.5, -1.0), candidate("a", 0.2, 0.5, -1.0)]
    texts = [*drawn_twice, candidate("b", 0.69, 0.5, -2.0), candidate("c", 0.3, 1.0, -1.0, 0.2)]
    rows = [row(0, {"CAPTION": texts}, [answer("x", True, None, None)]), {"id": 1, "error": "no image"}]
    values = read_values(written(tmp_path, rows))
    assert 0.69 - 0.34 < 0.35 and (values.questions, values.unanswered, values.unscored) == (1, 1, 1)
    found = measure_verifier(values)["CAPTION"]
    # values 0.34, 0.69, 0.3; scores 0.5, 0.5, 1: a < b a tie, c < b wrong, and c < a, which is not clear, wrong
    assert found["clear_pairs"] == dict(count=2, clusters=1, mean=0.25, standard_error=None, questions=1)
    assert found["all_pairs"]["mean"] == pytest.approx(0.5 / 3)
    assert found["all_pairs_by_log_prob"]["mean"] == pytest.approx(0.5 / 3)
    assert found["rank_correlation"]["mean"] == pytest.approx(-np.sqrt(3) / 2)
    assert (found["questions"], found["candidates"]) == (1, 4)
    assert found["chosen_value"]["mean"] == 0.3 and found["best_value"]["mean"] == 0.69
    assert found["random_value"]["mean"] == pytest.approx((0.34 * 2 + 0.69 + 0.3) / 4)
    assert found["other_probability"] == {"mean": 0.05, "percentile_95": pytest.approx(0.17)}
    assert found["calibration"]["expected_calibration_error"] == pytest.approx((0.13 + 0.7) / 4)


def test_the_edges_of_the_bins():
    scores = [0.0, 0.1, 0.3, float(np.nextafter(0.3, 0)), 0.7, 1.0]
    found = calibration([ValuedText(str(i), 1, 0.0, score, 0.0, None) for i, score in enumerate(scores)])
    assert [each["candidates"] for each in found["bins"]] == [1, 1, 1, 1, 0, 0, 0, 1, 0, 1]


def test_differences_are_those_of_the_same_candidates(before, after, tmp_path):
    """Questions whose candidates differ in a text or a value are left out."""
    rows = drawn(2)
    rows[0]["stages"][0]["candidates"][1]["text"] = "another"
    rows[1]["stages"][0]["candidates"][0]["value"] = 0.3125
    rows[2]["stages"][0]["before"] = "after another text"
    found = differences(read_values(written(tmp_path, rows)), before)
    assert {part: (each["questions"], each["left_out"]) for part, each in found.items()} == {
        "CAPTION": (37, 3),
        "CONCLUSION": (40, 0),
        "whole answers": (40, 0),
    }
    for part, start in (("CAPTION", 3), ("whole answers", 0)):
        first, second = (anew(drawn(seed)[start:], part) for seed in (2, 1))
        for name in ("rank_correlation", "clear_pairs", "all_pairs", "chosen_value"):
            both = zip(first[name], second[name], strict=True)
            mean, error, count = clustered_mean([(image, one - other) for (image, one), (_, other) in both])
            told = found[part][name]
            assert (told["difference"], told["standard_error"], told["count"]) == pytest.approx((mean, error, count))
            assert told["interval"] == pytest.approx((mean - 1.959964 * error, mean + 1.959964 * error), abs=1e-6)
    others = [each | {"id": f"other-{each['id']}"} for each in drawn(2)]
    assert differences(read_values(written(tmp_path, others)), before) == {}


@pytest.mark.slow
def test_the_command(folder, before, after):
    """Without jax, twice the same files; the table has what the result has."""
    output = folder / "measured"
    unlike = [UNSCORED, *({"id": i, "error": "no image"} for i in range(2)), GOOD | {"id": 8}]
    other = written(folder / "other", unlike)
    arguments = ["--values", before.name, after.name, other, "--output", str(output)]
    ended = run("evaluate", *arguments)
    assert ended.code == 0 and not ended.imported, ended.error
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    assert set(files) == {"result.json", "calibration.png", "calibration.svg"}
    result = json.loads(files["result.json"])
    assert [each["values"] for each in result["verifiers"]] == [before.name, after.name, other]
    parts = [each["parts"] for each in result["verifiers"]]
    assert parts[:2] == [measure_verifier(before), measure_verifier(after)]
    (less, none), found = result["differences"], json.loads(json.dumps(differences(after, before)))
    assert (less["values"], less["less"], less["parts"]) == (after.name, before.name, found)
    for each in (*measure_verifier(before).values(), *measure_verifier(after).values()):
        assert f"{each['clear_pairs']['mean']:.1%} ± {each['clear_pairs']['standard_error']:.1%}" in ended.out
        assert f"{each['rank_correlation']['mean']:.2f} ± " in ended.out
    assert f"{found['CAPTION']['all_pairs']['difference']:+.1%} ± " in ended.out
    assert none["parts"] == {}
    assert f"{other} has no question with the candidates and values of {before.name}" in ended.out
    assert f"In {other}, 2 questions have no answer." in ended.out
    assert f"In {other}, 2 sets of candidates have no scores." in ended.out
    with Image.open(output / "calibration.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    assert ElementTree.fromstring(files["calibration.svg"]).tag.endswith("svg")
    for title in (*STAGES, "whole answers", before.name, after.name):
        assert f"<!-- {title} -->" in files["calibration.svg"].decode()
    main(arguments)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == files


GOOD = row(7, {"CAPTION": [candidate("a", 0.5, 0.5), candidate("b", 1, 0.2)]}, [answer("a", True, 0.5)])
UNSCORED = row(7, {"CAPTION": [candidate("a", 0.5, None, other=None)]}, [answer("a", True, None, None)])


def changed(**values: object) -> str:
    stages = [{**GOOD["stages"][0], "candidates": [GOOD["stages"][0]["candidates"][0] | values]}]
    return json.dumps(GOOD | {"id": 8, "stages": stages})


WRONG = {
    "no JSON": ('{"id": 8, "que', "values.jsonl, line 2 is not JSON"),
    "no stages": ('{"id": 8, "question": "x", "images": []}', "line 2: there is no stages"),
    "the same id": (json.dumps(GOOD), "line 2: the id 7 is that of an earlier line"),
    "a score of 2": (changed(score=2), "line 2: score of CAPTION is 2; it must be from 0 to 1"),
    "no value": (changed(value=None), "line 2: value of CAPTION is None; it must be a finite number"),
    "NaN": (changed(mean_log_prob=float("nan")), "line 2: mean_log_prob of CAPTION is nan"),
    "right of a text": (
        json.dumps(GOOD | {"id": 8, "answers": [answer("a", "yes", 0.5)]}),
        "line 2: right of a whole answer is 'yes'; it must be true or false",
    ),
    "some scores": (
        json.dumps(GOOD | {"id": 8, "answers": [answer("a", True, 0.5), answer("b", True, None)]}),
        "line 2: 1 of 2 candidates of whole answers have a score: score all or none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_broken_line(name, tmp_path):
    line, message = WRONG[name]
    written(tmp_path, [GOOD])
    with (tmp_path / "values.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--values", str(tmp_path), "--output", str(tmp_path / "measured")])
    assert not (tmp_path / "measured" / "result.json").exists()


def test_other_mistakes(tmp_path):
    good, output = written(tmp_path / "good", [GOOD]), ["--output", str(tmp_path / "measured")]
    (tmp_path / "answered").mkdir()
    (tmp_path / "answered" / "result.json").write_text('{"accuracy": {}}')
    wrong = {
        "nowhere/values.jsonl does not exist": ["--values", str(tmp_path / "nowhere"), *output],
        "good/values.jsonl/values.jsonl does not exist": ["--values", f"{good}/values.jsonl", *output],
        "empty/values.jsonl has no question with an answer": ["--values", written(tmp_path / "empty", []), *output],
        "bare/values.jsonl has no scores": ["--values", written(tmp_path / "bare", [UNSCORED]), *output],
        "good twice": ["--values", good, good, *output],
        "name another --output": ["--values", good, "--output", str(tmp_path / "answered")],
        "--limit has no meaning with --values": ["--values", good, *output, "--limit", "3"],
        "--benchmark has no meaning with --values": ["--values", good, *output, "--benchmark", "shapes"],
        "give --benchmark, whose": output,
        "--values names no folder": ["--config", '{"values": []}', *output],
    }
    for message, arguments in wrong.items():
        with pytest.raises(UserError, match=re.escape(message)):
            main(arguments)
    assert (tmp_path / "answered" / "result.json").read_text() == '{"accuracy": {}}'


def test_how_often_a_perfect_scorer_agrees():
    """The shares that the guide and the module tell, over all outcomes of 8 continuations of two candidates."""
    chances = [binom.pmf(np.arange(9), 8, chance) for chance in (0.6, 0.4)]
    both, difference = np.outer(*chances), np.subtract.outer(np.arange(9), np.arange(9)) / 8
    guide = " ".join((ROOT / "configs/README.md").read_text().split())
    for text in (" ".join(measures.__doc__.split()), guide):
        shares = re.search(
            r"(\d+)% at k = 8, and (\d+)% where|agrees with (\d+)% of all pairs and (\d+)% of clear", text
        )
        told = [int(share) for share in shares.groups() if share]
        for share, least in zip(told, (0.01, measures.CLEAR_DIFFERENCE), strict=True):
            above, below = both[difference >= least].sum(), both[difference <= -least].sum()
            assert share == round(100 * above / (above + below))
