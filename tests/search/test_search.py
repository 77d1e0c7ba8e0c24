"""The compiled search against one in plain Python, and what it promises of draws, counts and compilations."""

import pytest

from llava_cot_jax.search import reasoner as module
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.strategies import (
    BestOfN,
    Greedy,
    Judge,
    LogProbability,
    MajorityVote,
    Sample,
    StageBeam,
)
from tests.search import brute_force
from tests.search.models import PROMPTS, random_model, scene, trained_model

TOKEN = Judge("token")
RATIONALE = Judge("rationale", reason_tokens=12, check_tokens=9, temperature=0.9)
ONE_ORDER = Judge("rationale", both_orders=False, reason_tokens=9, check_tokens=12, temperature=1.1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def ending():
    """A random model that often ends an answer: one token in sixty does."""
    return random_model(1, eos=tuple(range(0, 500, 60)))


@pytest.fixture(scope="module")
def trained():
    return trained_model()


def tokens_found(monkeypatch):
    """Where the tokens of what a reasoner finds will be."""
    found = []
    fetch = module._fetch

    def keep(x):
        found.append(fetch(x))
        return found[-1]

    monkeypatch.setattr(module, "_fetch", keep)
    return found


def check_against_brute_force(monkeypatch, model, processor, strategy, prompts, image, question, seed):
    """The same tokens, ends, verdicts and winners; what was compared."""
    found = tokens_found(monkeypatch)
    answer = Reasoner(model, processor, strategy, prompts).answer(image, question, seed=seed)
    want = brute_force.search(model, processor, strategy, image, question, seed, JudgePrompts.load(prompts))
    candidates = found[0].candidates
    assert len(answer.trace.stages) == len(want)
    for number, (stage, expected) in enumerate(zip(answer.trace.stages, want, strict=True)):
        for i, (one, other) in enumerate(zip(stage.candidates, expected.candidates, strict=True)):
            ids = candidates.tokens[number, 0, i, : one.tokens].tolist()
            assert (ids, one.ended) == (other.ids, other.ended), (number, i)
            assert one.log_probability == pytest.approx(other.log_probability, abs=2e-3)
        verdicts = [v for match in stage.matches for v in match.verdicts]
        for verdict, other in zip([*stage.checks, *verdicts], [*expected.checks, *expected.verdicts], strict=True):
            assert (verdict.first, verdict.second, verdict.reason) == (other.first, other.second, other.reason)
            assert verdict.vote == pytest.approx(other.vote, abs=1e-4)
        for match, other in zip(stage.matches, expected.matches, strict=True):
            assert match.margin == pytest.approx(other.margin, abs=1e-4)
            assert (match.first, match.second, match.decision) == (other.first, other.second, other.decision)
            assert match.winner == other.winner
        assert stage.winner == expected.winner, number
    return answer


STRATEGIES = {
    "greedy": Greedy(budget=12),
    "sample": Sample(1.0, budget=12),
    "vote": MajorityVote(4, temperature=1.2, budget=10, top_p=1.0),
    "best by judge": BestOfN(5, TOKEN, temperature=1.0, budget=8, top_k=None),
    "best by reasons": BestOfN(3, RATIONALE, temperature=1.0, budget=8),
    "best by likelihood": BestOfN(3, LogProbability(), temperature=1.0, budget=8),
    "stages": StageBeam(3, TOKEN, temperature=0.9, budget=9),
    "stages by reasons": StageBeam(3, RATIONALE, temperature=(0.9, 0.0, 1.5, 0.7), budget=(9, 5, 7, 8)),
    "stages, some alone": StageBeam((2, 1, 4, 3), ONE_ORDER, temperature=0.8, budget=8, top_k=None, top_p=0.8),
    "stages by likelihood": StageBeam(2, LogProbability(), temperature=0.9, budget=9, stages=("PLAN", "CONCLUSION")),
    "greedy stages": StageBeam(2, TOKEN, temperature=0.0, budget=7),
}
QUICK = ("stages", "best by reasons")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]
)
def test_a_random_model_searches_as_brute_force_does(ending, prompts, monkeypatch, name):
    image, question = scene(3)
    check_against_brute_force(monkeypatch, *ending, STRATEGIES[name], prompts, image, question, seed=5)


TRAINED_STRATEGIES = {
    "greedy": Greedy(budget=110),
    "vote": MajorityVote(3, temperature=1.5, budget=110, top_k=None, top_p=1.0),
    "best by judge": BestOfN(3, TOKEN, temperature=1.2, budget=110),
    "stages": StageBeam(3, TOKEN, temperature=1.3, budget=(14, 30, 50, 9)),
    "stages by reasons": StageBeam(3, RATIONALE, temperature=2.0, budget=(14, 30, 50, 9)),
    "greedy stages": StageBeam(1, TOKEN, temperature=0.0, budget=60),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED_STRATEGIES)
def test_the_trained_model_searches_as_brute_force_does(trained, prompts, monkeypatch, name):
    image, question = scene(1)
    answer = check_against_brute_force(
        monkeypatch, *trained, TRAINED_STRATEGIES[name], prompts, image, question, seed=2
    )
    assert "tag" in {c.ended for stage in answer.trace.stages for c in stage.candidates}
    if name == "greedy stages":
        whole = Reasoner(*trained, Greedy(budget=110)).answer(image, question)
        assert (answer.text, answer.stages) == (whole.text.strip(), whole.stages)  # the tags were the natural ones


@pytest.mark.parametrize("convention", ["meta", pytest.param("transformers_4", marks=pytest.mark.slow)])
def test_without_an_image(prompts, monkeypatch, convention):
    model, processor = random_model(2, convention=convention)
    strategy = StageBeam(2, RATIONALE, temperature=0.9, budget=6)
    check_against_brute_force(monkeypatch, model, processor, strategy, prompts, None, scene(0)[1], seed=1)


@pytest.mark.slow
def test_the_check_sees_no_image_under_any_convention(prompts, monkeypatch):
    model, processor = random_model(2, convention="transformers_5")
    strategy = StageBeam(3, RATIONALE, temperature=0.9, budget=6)
    image, question = scene(4)
    check_against_brute_force(monkeypatch, model, processor, strategy, prompts, image, question, seed=1)


def plain(answer) -> dict:
    """All of an answer but the times."""
    answer.trace.seconds.clear()
    return vars(answer) | {"trace": vars(answer.trace)}


def test_neighbours_and_places_change_nothing(ending, prompts):
    """Four questions, one of them without an image, in two orders and beside others: bit for bit."""
    reasoner = Reasoner(*ending, StageBeam(3, RATIONALE, temperature=0.9, budget=6), prompts)
    images, questions = (list(x) for x in zip(*map(scene, range(6)), strict=True))
    images[2] = None
    seeds = [7, 8, 9, 10, 11, 12]

    def ask(*places):
        answers = reasoner.answer_batch(
            *([x[i] for i in places] for x in (images, questions)), seeds=[seeds[i] for i in places]
        )
        return dict(zip(places, map(plain, answers), strict=True))

    first, turned, others = ask(0, 1, 2, 3), ask(3, 2, 0, 1), ask(4, 0, 5, 2)
    assert first == turned
    assert all(others[i] == first[i] for i in (0, 2))
    assert first[0]["text"] != first[1]["text"]
