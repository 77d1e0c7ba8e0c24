"""The compiled search against one in plain Python, and its promises about draws, counts and compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.sharding import make_mesh, parameter_sharding
from llava_cot_jax.search import reasoner as module
from llava_cot_jax.search.program import search
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.scorers import Judge, LogProbability, Verifier
from llava_cot_jax.search.strategies import BestOfN, Greedy, MajorityVote, Sample, StageBeam, WeightedVote
from llava_cot_jax.stage_format import STAGES
from tests.model.test_named_scopes import scopes
from tests.search import brute_force
from tests.search.models import TRAINED_BEAM, random_model, scene, trained_model
from tests.tiers import in_tiers

TOKEN = Judge("token")
RATIONALE = Judge("rationale", reason_tokens=12, check_tokens=9, temperature=0.9)
SHORT = Judge("rationale", reason_tokens=6, check_tokens=5, temperature=1.2)
ONE_ORDER = Judge("rationale", both_orders=False, reason_tokens=9, check_tokens=12, temperature=1.1)


@pytest.fixture(scope="module")
def ending():
    """A random model that often ends an answer: one token in sixty does."""
    return random_model(1, eos=tuple(range(0, 500, 60)))


@pytest.fixture(scope="module")
def trained():
    return trained_model()


def recorded_results(monkeypatch, name: str = "search"):
    """Return a list that takes the result of each compiled search, the function ``name``, that a reasoner runs."""
    found, run = [], getattr(module, name)

    def keep(*arguments, **static):
        found.append(run(*arguments, **static))
        return found[-1]

    monkeypatch.setattr(module, name, keep)
    return found


def check_against_brute_force(monkeypatch, model, processor, strategy, prompts, image, question, seed):
    """Check that tokens, ends, verdicts and winners are the same. Return the answer."""
    found = recorded_results(monkeypatch)
    answer = Reasoner(model, processor, strategy, prompts).answer(image, question, seed=seed)
    want = brute_force.search(model, processor, strategy, image, question, seed, JudgePrompts.load(prompts))
    candidates = jax.device_get(found[0].candidates)
    assert len(answer.trace.stages) == len(want)
    for number, (stage, expected) in enumerate(zip(answer.trace.stages, want, strict=True)):
        for i, (one, other) in enumerate(zip(stage.candidates, expected.candidates, strict=True)):
            ids = candidates.tokens[number, 0, i, : one.tokens].tolist()
            reason = {"heading": "tag", "turn": "eos"}.get(one.ended, one.ended)
            assert (ids, reason) == (expected.kept[i], other.ended), (number, i)
            assert one.log_prob == pytest.approx(other.log_prob, abs=2e-3)
        verdicts = [v for match in stage.matches for v in match.verdicts]
        for verdict, other in zip([*stage.checks, *verdicts], [*expected.checks, *expected.verdicts], strict=True):
            assert (verdict.first, verdict.second, verdict.reason) == (other.first, other.second, other.reason)
            assert verdict.vote == pytest.approx(other.vote, abs=1e-4)
        for match, other in zip(stage.matches, expected.matches, strict=True):
            assert match.margin == pytest.approx(other.margin, abs=1e-4)
            assert (match.first, match.second, match.decision) == (other.first, other.second, other.decision)
            assert match.winner == other.winner
        for one, (score, other) in zip(stage.candidates, expected.scores, strict=bool(expected.scores)):
            assert one.score == pytest.approx(score, abs=1e-4)
            assert one.other_probability == pytest.approx(other, abs=1e-4)
        assert stage.winner == expected.winner, number
    return answer


STRATEGIES = {
    "greedy": Greedy(max_new_tokens=12),
    "sample": Sample(1.0, max_new_tokens=12),
    "vote": MajorityVote(4, temperature=1.2, max_new_tokens=10, top_p=1.0),
    "best by judge": BestOfN(5, TOKEN, temperature=1.0, max_new_tokens=8, top_k=None),
    "best by reasons": BestOfN(3, RATIONALE, temperature=1.0, max_new_tokens=8),
    "best by likelihood": BestOfN(3, LogProbability(), temperature=1.0, max_new_tokens=8),
    "stages": StageBeam(3, TOKEN, temperature=0.9, max_new_tokens=9),
    "stages by reasons": StageBeam(3, RATIONALE, temperature=(0.9, 0.0, 1.5, 0.7), max_new_tokens=(9, 5, 7, 8)),
    "stages, some alone": StageBeam((2, 1, 4, 3), ONE_ORDER, temperature=0.8, max_new_tokens=8, top_k=None, top_p=0.8),
    "stages by likelihood": StageBeam(
        2, LogProbability(), temperature=0.9, max_new_tokens=9, stages=("PLAN", "CONCLUSION")
    ),
    "greedy stages": StageBeam(2, TOKEN, temperature=0.0, max_new_tokens=7),
    "stages by verifier": StageBeam((3, 1, 4, 3), Verifier(), temperature=0.9, max_new_tokens=(9, 5, 7, 8)),
    "best by verifier": BestOfN(5, Verifier(), temperature=1.0, max_new_tokens=8),
    "weighted vote": WeightedVote(5, temperature=1.2, max_new_tokens=4, top_p=1.0),
    "many by reasons": StageBeam(6, SHORT, temperature=1.2, max_new_tokens=4, stages=("CAPTION", "REASONING")),
}
SUITE = ("greedy", "best by judge", "stages by reasons", "stages by verifier", "weighted vote")


@pytest.mark.parametrize("name", in_tiers(STRATEGIES, quick=["stages"], suite=SUITE))
def test_a_random_model_searches_as_brute_force_does(ending, prompts, monkeypatch, name):
    image, question = scene(3)
    check_against_brute_force(monkeypatch, *ending, STRATEGIES[name], prompts, image, question, seed=5)


TRAINED_STRATEGIES = {
    "greedy": Greedy(max_new_tokens=110),
    "vote": MajorityVote(3, temperature=1.5, max_new_tokens=110, top_k=None, top_p=1.0),
    "best by judge": BestOfN(3, TOKEN, temperature=1.2, max_new_tokens=110),
    "stages": TRAINED_BEAM,
    "stages by reasons": StageBeam(3, RATIONALE, temperature=2.0, max_new_tokens=(14, 30, 50, 9)),
    "stages by verifier": StageBeam(3, Verifier(), temperature=1.3, max_new_tokens=(14, 30, 50, 9)),
    "weighted vote": WeightedVote(4, temperature=1.5, max_new_tokens=110, top_k=None, top_p=1.0),
    "greedy stages": StageBeam(1, TOKEN, temperature=0.0, max_new_tokens=60),
}


@pytest.mark.parametrize("name", in_tiers(TRAINED_STRATEGIES, suite=["stages"]))
def test_the_trained_model_searches_as_brute_force_does(trained, prompts, monkeypatch, name):
    image, question = scene(1)
    answer = check_against_brute_force(
        monkeypatch, *trained, TRAINED_STRATEGIES[name], prompts, image, question, seed=2
    )
    assert "tag" in {c.ended for stage in answer.trace.stages for c in stage.candidates}
    if name == "greedy stages":
        whole = Reasoner(*trained, Greedy(max_new_tokens=110)).answer(image, question)
        assert (answer.text, answer.stages) == (whole.text.strip(), whole.stages)  # the tags were the natural ones


@pytest.mark.parametrize("convention", in_tiers(["meta", "transformers_4"], suite=["meta"]))
def test_without_an_image(prompts, monkeypatch, convention):
    model, processor = random_model(2, convention=convention)
    strategy = StageBeam(2, RATIONALE, temperature=0.9, max_new_tokens=6)
    check_against_brute_force(monkeypatch, model, processor, strategy, prompts, None, scene(0)[1], seed=1)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_check_sees_no_image_under_any_convention(prompts, monkeypatch):
    model, processor = random_model(2, convention="transformers_5")
    strategy = StageBeam(3, RATIONALE, temperature=0.9, max_new_tokens=6)
    image, question = scene(4)
    check_against_brute_force(monkeypatch, model, processor, strategy, prompts, image, question, seed=1)


def plain(answer) -> dict:
    """Return all of an answer but the times."""
    answer.trace.seconds.clear()
    return vars(answer) | {"trace": vars(answer.trace)}


@pytest.mark.slow
def test_neighbours_and_places_change_nothing(ending, prompts):
    """Four questions, one of them without an image, in two orders and beside others: bit for bit."""
    reasoner = Reasoner(*ending, StageBeam(3, RATIONALE, temperature=0.9, max_new_tokens=6), prompts)
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


EPSILON = 1e-3
"""Lead in score over the second best token below which rounding may decide a draw."""


def on(mesh, model: Mllama) -> Mllama:
    table = parameters(model.config, "unrolled")
    arrays = {
        path: jax.device_put(x, parameter_sharding(table[path], mesh))
        for path, x in flatten_dict(model.params, sep=".").items()
    }
    return Mllama.from_arrays(model.config, arrays, layout="unrolled", mesh=mesh)


TWO_QUESTIONS = StageBeam(3, TOKEN, temperature=0.9, max_new_tokens=8)


@pytest.fixture(scope="module")
def two_by_brute_force(ending, prompts):
    """The stages of two answers."""
    loaded = JudgePrompts.load(prompts)
    return [brute_force.search(*ending, TWO_QUESTIONS, *scene(i), seed, loaded) for i, seed in enumerate((4, 5))]


@pytest.mark.parametrize("mesh", in_tiers([None, (2, 2, 2), (1, 8, 1), (1, 4, 2)], suite=[(2, 2, 2)]), ids=str)
def test_other_batch_shapes_and_meshes_draw_the_same(ending, prompts, monkeypatch, mesh, two_by_brute_force):
    """Where a question's tokens first differ from those of brute force, the lead in score was within rounding."""
    model, processor = ending
    found = recorded_results(monkeypatch)
    spread = model if mesh is None else on(make_mesh(*mesh), model)
    images, questions = zip(*map(scene, range(2)), strict=True)
    Reasoner(spread, processor, TWO_QUESTIONS, prompts).answer_batch(images, questions, seeds=[4, 5])
    candidates = jax.device_get(found[0].candidates)
    alike = 0
    for i, want in enumerate(two_by_brute_force):
        for number, stage in enumerate(want):
            for j, one in enumerate(stage.candidates):
                ids = candidates.tokens[number, i, j, : candidates.lengths[number, i, j]].tolist()
                if other := [place for place, pair in enumerate(zip(ids, one.ids, strict=False)) if pair[0] != pair[1]]:
                    assert one.margins[other[0]] < EPSILON
                    break
                alike += 1
            else:
                continue
            break  # what follows another token is another text
    assert alike > 12


@pytest.mark.slow
@pytest.mark.exhaustive
def test_more_candidates_begin_with_the_fewer(ending, prompts, monkeypatch):
    found = recorded_results(monkeypatch)
    image, question = scene(2)
    for count in (2, 4):
        strategy = StageBeam(count, LogProbability(), temperature=1.0, max_new_tokens=8)
        Reasoner(*ending, strategy, prompts).answer(image, question, seed=1)
    two, four = (jax.device_get(x.candidates.tokens[0, 0]) for x in found)
    np.testing.assert_array_equal(two, four[:2])
    assert len({tuple(row) for row in four.tolist()}) == 4


@pytest.mark.parametrize("name", ["greedy", "best by judge", "stages", "stages by reasons"])
def test_the_program_sees_the_images_once(ending, prompts, name):
    """The kernel of the patches is used in one place, outside every loop, whatever the search and its candidates."""
    model, processor = ending
    builder = RequestBuilder(processor, STRATEGIES[name], prompts)
    image, question = scene(0)
    inputs = builder.build([image], [question]).inputs
    static = {"config": model.config, "spec": builder.spec, "prefill_chunk": 64, "mesh": None}
    tables = (builder.stage_tables, builder.scorer_tables)
    program = jax.make_jaxpr(lambda params, x: search(params, x, *tables, **static))(model.params, inputs)
    kernel = model.params["vision_model"]["patch_embedding"]["weight"].shape
    assert uses(program.jaxpr, kernel) == [()]


@pytest.mark.slow
def test_a_search_in_bfloat16(prompts):
    """Most checkpoints are in bfloat16. Two questions are answered together, with candidates and written reasons."""
    reasoner = Reasoner(*random_model(1, dtype=jnp.bfloat16), StageBeam(2, SHORT, max_new_tokens=6), prompts)
    for answer in reasoner.answer_batch(*zip(scene(0), scene(1), strict=True)):
        assert [stage.stage for stage in answer.trace.stages] == list(STAGES)
        scores = [c.mean_log_prob for stage in answer.trace.stages for c in stage.candidates]
        assert min(scores) > -10 and max(scores) < 0


def uses(jaxpr, shape: tuple[int, ...], loops: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the loops around each product that takes an array of a shape."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and shape in [x.aval.shape for x in equation.invars]:
            found.append(loops)
        inner = loops + ((equation.primitive.name,) if equation.primitive.name in ("while", "scan") else ())
        for part in jax.extend.core.jaxprs_in_params(equation.params):
            found += uses(part, shape, inner)
    return found


@pytest.mark.slow
def test_counts_of_a_trace_are_those_of_the_texts(trained, prompts):
    """The vision tower runs once and the prompt is prefilled once, for one candidate and for three."""
    model, processor = trained
    image, question = scene(5)
    prompt = processor.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}])
    length = len(processor.tokenizer(prompt + "<SUMMARY>", add_special_tokens=False)["input_ids"])
    for strategy in (TRAINED_STRATEGIES["greedy stages"], TRAINED_BEAM):
        answer = Reasoner(model, processor, strategy, prompts).answer(image, question)
        trace, is_judged = answer.trace, strategy is TRAINED_BEAM
        assert (trace.vision_encoder_calls, trace.tokens["prompt"]) == (1, length)
        whole = processor.tokenizer(prompt + answer.text, add_special_tokens=False)["input_ids"]
        won = trace.stages[-1].candidates[trace.stages[-1].winner].tokens
        assert trace.tokens["prompt"] + trace.tokens["winners"] == len(whole) - won
        assert trace.tokens["candidates"] == sum(c.tokens for stage in trace.stages for c in stage.candidates)
        assert (trace.tokens["judge_queries"] > 0) == (trace.tokens["judge_prefixes"] > 0) == is_judged
        assert trace.flops["vision"] > 0 and (trace.flops["judge_queries"] > 0) == is_judged


@pytest.mark.slow
def test_fifty_questions_compile_once(ending, prompts):
    """The questions differ in length, images and seeds."""
    reasoner = Reasoner(*ending, StageBeam(2, RATIONALE, temperature=0.9, max_new_tokens=4), prompts)
    image, question = scene(0)
    reasoner.answer(image, question)
    compilations = CompilationCounter()
    texts = {reasoner.answer(scene(i)[0], f"{scene(i)[1]}{' red' * (i % 17)}", seed=i).text for i in range(50)}
    assert compilations.count == 0
    assert len(texts) == 50


@pytest.mark.slow
def test_names_of_a_searchs_parts_in_the_program(ending, prompts):
    """Profiles are read by these names."""
    model, processor = ending
    builder = RequestBuilder(processor, STRATEGIES["stages by reasons"], prompts)
    image, question = scene(0)
    static = {"config": model.config, "spec": builder.spec, "prefill_chunk": 64, "mesh": None}
    inputs = builder.build([image], [question]).inputs
    lowered = search.lower(model.params, inputs, builder.stage_tables, builder.scorer_tables, **static)
    assert scopes(lowered) >= {
        "encode_images/vision_tower",
        "stage/extend_prefix/prefill",
        "stage/candidates/sample",
        "stage/judge/tournament_round/judge_prefix/prefill",
        "stage/judge/tournament_round/judge_queries/prefill",
        "stage/judge/tournament_round/judge_queries/sample",
    }
