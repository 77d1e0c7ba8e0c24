"""The retracing search against one in plain Python, its rounds, its threshold, and what it refuses."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from llava_cot_jax import generate
from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.errors import UserError
from llava_cot_jax.search.options import strategy_or_sampling
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.retracing import DEVIATIONS, Retracing, Threshold, read_threshold, reasoning_scores
from llava_cot_jax.stage_format import STAGES, StageFormat
from tests.search.brute_force_retracing import RetracingSearch
from tests.search.models import random_model, scene
from tests.search.test_search import plain, recorded_results

SMALL = Retracing(3, 2, 2, 3, threshold=1.0, max_rounds=3, temperature=1.0, max_new_tokens=5)
"""The search of all tests here, whose program takes long to compile."""


@pytest.fixture(scope="module")
def ending():
    """A random model that often ends an answer: one token in sixty does."""
    return random_model(1, eos=tuple(range(0, 500, 60)))


def check_against_brute_force(monkeypatch, model, processor, strategy, prompts, image, question, seed):
    """Check that tokens, ends, scores, parents and winners are the same. Return the answer."""
    found = recorded_results(monkeypatch, "search_retracing")
    answer = Reasoner(model, processor, strategy, prompts).answer(image, question, seed=seed)
    want = RetracingSearch(model, processor, strategy, image, question, seed, JudgePrompts.load(prompts)).run()
    tokens = jax.device_get(found[0].candidates.tokens)
    rounds = [stage for pair in zip(want.captions, want.reasonings, strict=True) for stage in pair]
    expected = [[want.summary], *rounds, want.conclusions]
    assert len(answer.trace.stages) == len(expected)
    for index, (stage, others) in enumerate(zip(answer.trace.stages, expected, strict=True)):
        place = index if index + 1 < len(expected) else len(tokens) - 1
        for i, (one, other) in enumerate(zip(stage.candidates, others, strict=True)):
            assert tokens[place, 0, i, : one.tokens].tolist() == other.draws.ids, (index, i)
            assert one.ended == other.draws.ended
            assert one.log_prob == pytest.approx(other.draws.log_prob, abs=2e-3)
            if stage.stage != STAGES[0]:
                assert one.score == pytest.approx(other.score[0], abs=1e-4)
            if stage.stage == STAGES[2]:
                assert one.parent == other.parent
            if stage.stage == STAGES[3]:
                per_round = strategy.keep * strategy.reasonings
                assert (one.parent_round - 1) * per_round + one.parent == other.parent
    won = want.conclusions[want.winner]
    assert answer.trace.stages[-1].winner == want.winner
    reasoning = [one for stage in want.reasonings for one in stage][won.parent]
    told = answer.trace.path
    assert list(told) == list(STAGES) == list(answer.stages)
    assert told["REASONING"].log_prob == pytest.approx(reasoning.draws.log_prob, abs=2e-3)
    ids = [processor.decode(one.draws.ids) for one in (want.summary, reasoning, won)]
    assert [told[name].text for name in ("SUMMARY", "REASONING", "CONCLUSION")] == ids
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [1.0, 0.0])
def test_a_random_model_searches_as_brute_force_does(ending, prompts, monkeypatch, threshold):
    """With the highest threshold it retraces as often as it may, with the lowest never."""
    strategy = replace(SMALL, threshold=threshold)
    image, question = scene(3)
    answer = check_against_brute_force(monkeypatch, *ending, strategy, prompts, image, question, seed=5)
    rounds = [stage.round for stage in answer.trace.stages]
    assert rounds == ([0, 1, 1, 2, 2, 3, 3, 0] if threshold else [0, 1, 1, 0])


@pytest.mark.slow
def test_neighbours_and_places_change_nothing(ending, prompts):
    """Three questions that need different numbers of rounds, one of them without an image: bit for bit."""
    (image, first), (_, second), (other, third) = scene(0), scene(1), scene(2)
    asked = [(image, first, 3), (None, second, 4), (other, third, 5)]

    def ask(strategy: Retracing, *places):
        images, questions, seeds = zip(*(asked[place] for place in places), strict=True)
        reasoner = Reasoner(*ending, strategy, prompts)
        return reasoner.answer_batch(list(images), list(questions), seeds=list(seeds))

    once = replace(SMALL, threshold=0.0)  # which every second best reasoning is above
    lowest, middle, _ = sorted(sorted(reasoning_scores(each.trace))[-2] for each in ask(once, 0, 1, 2))
    strategy = replace(SMALL, threshold=(lowest + middle) / 2)
    straight, turned, doubled = (
        dict(zip(places, map(plain, ask(strategy, *places)), strict=True))
        for places in ((0, 1, 2), (2, 0, 1), (1, 1, 0))
    )
    assert straight == turned
    assert all(doubled[place] == straight[place] for place in doubled)
    assert len({len(answer["trace"]["stages"]) for answer in straight.values()}) > 1


@pytest.mark.slow
def test_a_round_more_is_needed_while_the_second_best_reasoning_is_weak(ending, prompts):
    """The rounds are those of the highest threshold, up to the first after which two scores lie above it."""
    whole = Reasoner(*ending, SMALL, prompts).answer(*scene(2), seed=3).trace
    scores = [[c.score for c in s.candidates] for s in whole.stages if s.stage == "REASONING"]
    assert len(scores) == 3
    second = [sorted(score for each in scores[:rounds] for score in each)[-2] for rounds in (1, 2, 3)]
    threshold = float(np.nextafter(np.float32(second[0]), np.float32(0)))
    trace = Reasoner(*ending, replace(SMALL, threshold=threshold), prompts).answer(*scene(2), seed=3).trace
    assert max(stage.round for stage in trace.stages) == 1
    assert [stage.candidates for stage in trace.stages[:3]] == [stage.candidates for stage in whole.stages[:3]]
    threshold = second[0]  # it must be above
    trace = Reasoner(*ending, replace(SMALL, threshold=threshold), prompts).answer(*scene(2), seed=3).trace
    assert max(stage.round for stage in trace.stages) == (2 if second[1] > second[0] else 3)


@pytest.mark.slow
def test_nothing_is_read_twice_and_nothing_is_compiled_again(ending, prompts):
    """What is read between two stages is the last token of a candidate, its closing and the next opening."""
    model, processor = ending
    reasoner = Reasoner(model, processor, SMALL, prompts)
    answers = [reasoner.answer(*scene(0), seed=0)]
    compilations = CompilationCounter()
    answers += [reasoner.answer(*scene(i), seed=i) for i in range(1, 4)]
    Reasoner(model, processor, replace(SMALL, threshold=0.25), prompts).answer(*scene(0), seed=0)
    assert compilations.count == 0 and len({answer.text for answer in answers}) == 4

    def between(candidate, opening: str) -> int:
        assert candidate.added
        text = f"{candidate.added}\n\n"
        return (candidate.tokens > 0) + sum(
            len(processor.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (text, opening)
        )

    for answer in answers:
        stages, expected = answer.trace.stages, between(answer.trace.stages[0].candidates[0], "<CAPTION>")
        for stage, before in zip(stages[2:-1:2], stages[1:-1:2], strict=True):
            kept = {candidate.parent for candidate in stage.candidates}
            expected += sum(between(before.candidates[i], "<REASONING>") for i in kept)
        for one in stages[-1].candidates:
            reasonings = next(s for s in stages if (s.stage, s.round) == ("REASONING", one.parent_round))
            expected += between(reasonings.candidates[one.parent], "<CONCLUSION>")
        assert answer.trace.tokens["winners"] == expected
        assert answer.trace.tokens["candidates"] == sum(
            c.tokens + (c.ended == "eos") for stage in stages for c in stage.candidates
        )


@pytest.mark.slow
def test_a_threshold_is_found_stored_and_used(untrained, capsys, tmp_path):
    path, trace_path = tmp_path / "threshold.json", tmp_path / "trace.json"
    given = ["--search=retracing", "--max_new_tokens=12", "--draw=2", f"--draw_to={tmp_path}"]
    given.append(f"--checkpoint={untrained}")
    generate.main([*given, f"--threshold_to={path}", "--threshold=1", "--max_rounds=1", f"--trace={trace_path}"])
    assert f"to {path}: the mean of 8 reasonings' scores is" in " ".join(capsys.readouterr().err.split())
    traces = json.loads(trace_path.read_text())
    scores = [
        c["score"] for trace in traces for s in trace["stages"] if s["stage"] == "REASONING" for c in s["candidates"]
    ]
    stored = json.loads(path.read_text())
    assert stored["mean"] == pytest.approx(np.mean(scores)) and stored["std"] == pytest.approx(np.std(scores))
    assert stored["threshold"] == pytest.approx(np.mean(scores) + 0.2533 * np.std(scores))
    assert read_threshold(str(path)) == stored["threshold"]
    found = strategy_or_sampling(generate._parser().parse_args([*given, f"--threshold={path}"]))
    assert found == Retracing(max_new_tokens=12, threshold=stored["threshold"])


def test_a_threshold_of_scores():
    found = Threshold.of([0.2, 0.4, 0.9])
    assert (found.count, found.mean) == (3, pytest.approx(0.5))
    assert found.threshold == pytest.approx(0.5 + DEVIATIONS * found.std) and found.std == pytest.approx(
        np.std([0.2, 0.4, 0.9])
    )
    assert Threshold.of([1.0] * 40 + [0.0]).threshold == 1.0  # no score is higher
    with pytest.raises(UserError, match="at least two reasonings, but there are 1"):
        Threshold.of([0.5])


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"threshold": "high"}', '{"threshold": true}', '{"threshold": NaN}']
)
def test_a_file_without_a_threshold(tmp_path, content):
    path = tmp_path / "threshold.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"threshold.json holds no threshold: give a number, or a file that") as told:
        read_threshold(str(path))
    assert "\n" not in str(told.value)


SETTINGS = {
    "no captions": (lambda: Retracing(captions=0), "captions is 0; it must be at least 1"),
    "more than there are": (lambda: Retracing(captions=2, keep=3), "keep is 3, but there are 2 captions"),
    "too few reasonings": (lambda: Retracing(keep=1, reasonings=2), "a round has 2 reasonings .* the search needs 3"),
    "no second best": (lambda: Retracing(keep=1, reasonings=1, conclusions=1), "a round has 1 reasonings"),
    "half a round": (lambda: Retracing(max_rounds=0.5), "max_rounds is 0.5; it must be a whole number"),
    "no rounds": (lambda: Retracing(max_rounds=0), "max_rounds is 0; it must be at least 1"),
    "a high threshold": (lambda: Retracing(threshold=1.2), "threshold is 1.2; a verifier's score is from 0 to 1"),
    "upstream's": (lambda: Retracing(threshold=-0.243), "threshold is -0.243; a verifier's score is from 0 to 1"),
    "no number": (lambda: Retracing(threshold=float("nan")), "threshold is nan; it must be a finite number"),
    "a name": (lambda: Retracing(format="mulberry"), "format is 'mulberry'; give a StageFormat"),
    "two stages": (
        lambda: Retracing(format=StageFormat.tagged(("A", "B"))),
        "has 2 stages, but a retracing search needs",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_used(name):
    make, message = SETTINGS[name]
    with pytest.raises(UserError, match=message) as told:
        make()
    assert "\n" not in str(told.value)


OPTIONS = {
    "a threshold alone": (["--threshold=0.5"], "--threshold needs a search: give --search too"),
    "another search": (
        ["--search=stage_beam", "--max_rounds=3"],
        "--max_rounds has no meaning for --search stage_beam",
    ),
    "a judge": (["--search=retracing", "--judge=token"], "--judge has no meaning for --search retracing"),
    "candidates": (["--search=retracing", "--num_candidates=3"], "--num_candidates has no meaning for --search retrac"),
    "no file": (["--search=retracing", "--threshold=none.json"], "none.json does not exist"),
    "above 1": (["--search=retracing", "--threshold=2"], "threshold is 2.0; a verifier's score is from 0 to 1"),
    "stored for another": (
        ["--search=greedy", "--threshold_to=x.json"],
        "--threshold_to stores a threshold of --search r",
    ),
    "stored from a file of questions": (
        ["--search=retracing", "--questions=asked.jsonl", "--output=answers.jsonl", "--threshold_to=x.json"],
        "--threshold_to has no meaning with --questions",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_be_used(name):
    given, message = OPTIONS[name]
    with pytest.raises(UserError, match=message) as told:
        generate.main(given)
    assert "\n" not in str(told.value)


def test_a_stream_is_refused(prompts):
    model, processor = random_model()
    with pytest.raises(UserError, match=r"^Retracing answers no stream of questions: ask with"):
        Reasoner(model, processor, Retracing(), prompts).answer_stream([])


def test_a_default_length_shrinks_to_what_the_context_leaves(prompts):
    _, processor = random_model()
    shrunk = RequestBuilder(processor, Retracing(), prompts).build([None], ["red?"])
    assert 100 < shrunk.spec.max_new_tokens[0] < 256
