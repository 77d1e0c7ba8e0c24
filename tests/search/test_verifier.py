"""The verifier's scores against transformers, its choices and votes, what it counts, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MllamaForConditionalGeneration

from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.sharding import make_mesh
from llava_cot_jax.model.vision_tower import normalize
from llava_cot_jax.planning.search_plan import plan_search
from llava_cot_jax.planning.slices import parse_topology
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.search.answers import _score_of, _vote
from llava_cot_jax.search.lengths import probe_capacity, probe_chunk
from llava_cot_jax.search.program import search
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS, JudgePrompts
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.scorers import Judge, LogProbability, Verifier
from llava_cot_jax.search.strategies import BestOfN, StageBeam, WeightedVote
from llava_cot_jax.search.tables import build_verifier_tables, scored_stages
from llava_cot_jax.search.trace import CandidateTrace, StageTrace
from llava_cot_jax.search.verifier import rank_candidates
from llava_cot_jax.stage_format import LLAVA_COT
from tests.model.test_named_scopes import scopes
from tests.search.models import random_model, scene
from tests.search.test_lengths import caches_of_the_program
from tests.search.test_search import on, plain, recorded_results

STRATEGY = StageBeam((3, 2, 1, 3), Verifier(), temperature=0.9, max_new_tokens=(9, 5, 7, 8))


@pytest.fixture(scope="module")
def ending():
    """A random model that often ends an answer, under the convention of the installed transformers."""
    return random_model(1, convention="transformers_5", eos=tuple(range(0, 500, 20)))


@pytest.mark.slow
@pytest.mark.parametrize("has_image", [True, False])
def test_scores_are_those_of_transformers(ending, prompts, monkeypatch, tmp_path, has_image):
    """One sequence for each candidate, read as a whole: the prompt, winners, candidate, closing tag, and the probe."""
    model, processor = ending
    model.save_pretrained(tmp_path)
    theirs = MllamaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    image, question = scene(3)
    images, found = [image] if has_image else [], recorded_results(monkeypatch)
    answer = Reasoner(model, processor, STRATEGY, prompts).answer(image if has_image else None, question, seed=6)
    candidates = jax.device_get(found[0].candidates)
    arrays = processor([processor.prompt(user_turn(question, len(images)))], [images])

    def ids(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def probabilities(sequence: list[int]) -> np.ndarray:
        given = {name: x for name, x in arrays.items() if name not in ("input_ids", "attention_mask")}
        if images:
            mask = given["cross_attention_mask"]
            later = np.repeat(mask[:, -1:], len(sequence) - mask.shape[1], axis=1)
            given["cross_attention_mask"] = np.concatenate([mask, later], axis=1).astype(np.int64)
            tiles = jnp.asarray(given["pixel_values"]), jnp.asarray(given["aspect_ratio_ids"])
            pixels = normalize(model.config.vision, *tiles)
            given["pixel_values"] = np.array(pixels, np.float32)
        else:
            given = {}
        tensors = {name: torch.tensor(x) for name, x in given.items()}
        row = torch.tensor([sequence])
        with torch.no_grad():
            logits = theirs(input_ids=row, attention_mask=torch.ones_like(row), **tensors, use_cache=False).logits
        return torch.softmax(logits[0, -1].double(), dim=-1).numpy()

    prefix, breaks, ends = arrays["input_ids"][0].tolist(), 2, set()
    for number, stage in enumerate(answer.trace.stages):
        prefix += ids("\n" * (2 - breaks) + f"<{stage.stage}>")
        asked = "Sound?" if stage.stage == "REASONING" else "Good?"
        probe = (
            f"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{asked}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nAnswer:"
        )
        for i, candidate in enumerate(stage.candidates):
            closing = candidate.added + "\n\n" if candidate.added else ""
            own = candidates.tokens[number, 0, i, : candidate.tokens].tolist() + ids(closing)
            p = probabilities(prefix + own + ids(probe))
            yes, no = p[ids(" yes")[0]], p[ids(" no")[0]]
            assert candidate.score == pytest.approx(yes / (yes + no), abs=1e-4)
            assert candidate.other_probability == pytest.approx(1 - yes - no, abs=1e-4)
            ends.add(candidate.ended)
            if i == stage.winner:
                won = own
                breaks = 2 if closing else len(candidate.text) - len(candidate.text.rstrip("\n"))
        assert stage.candidates[stage.winner].score == max(c.score for c in stage.candidates)
        prefix += won
    assert len({c.score for stage in answer.trace.stages for c in stage.candidates}) > 6
    assert ends == {"eos", "max_new_tokens"}


def test_the_highest_score_wins_and_then_the_likelier_candidate():
    score = jnp.array([[0.2, 0.9, 0.9, 0.1], [0.5, 0.5, 0.5, 0.9], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0]])
    mean = jnp.array([[-0.1, -2.0, -1.0, 0.0], [-1.0, -0.5, -0.5, -jnp.inf], [-3.0] * 4, [-1.0, -jnp.inf, -0.5, -2.0]])
    assert rank_candidates(score, mean)[:, 0].tolist() == [2, 1, 0, 2]


def vote_of(*candidates: tuple[str, float, float]) -> StageTrace:
    """Return a stage of whole answers, each with its conclusion, score, and mean log-probability."""
    traces = [
        CandidateTrace(f"<CONCLUSION> {text} </CONCLUSION>", "tag", "", 1, mean, mean, score, 0.1)
        for text, score, mean in candidates
    ]
    return StageTrace("whole", traces, [], [], 0)


VOTES = {
    "one sure answer beats two unsure ones": (("a", 0.3, -1.0), ("b", 0.9, -2.0), ("A.", 0.4, -0.1)),
    "two of middling scores beat one": (("b", 0.8, -0.1), ("a", 0.5, -1.0), ("a", 0.5, -0.5), ("c", 0.0, -0.1)),
    "equal sums go to the higher score": (("a", 0.25, -0.1), ("b", 0.5, -3.0), ("a", 0.25, -0.1)),
    "equal scores go to the likelier": (("a", 0.5, -2.0), ("a", 0.5, -1.0), ("b", 0.1, -0.1)),
    "rounding does not decide": (
        ("a", 0.1, -1.0),
        ("a", 0.2, -1.0),
        ("a", 0.3, -1.0),
        ("b", 0.3, -2.0),
        *(("b", 0.1, -2.0), ("b", 0.2, -2.0)),
    ),
}
WINNERS = dict(zip(VOTES, (1, 2, 1, 1, 2), strict=True))


@pytest.mark.parametrize("name", VOTES)
def test_a_weighted_vote(name):
    assert _vote(vote_of(*VOTES[name]), LLAVA_COT, _score_of).winner == WINNERS[name]


def test_a_weighted_vote_with_all_scores_1_is_a_majority_vote():
    rng = np.random.default_rng(0)
    winners = set()
    for _ in range(200):
        count = int(rng.integers(1, 9))
        drawn = zip(rng.choice(list("abc"), count), rng.choice([-0.1, -0.5, -2.0], count), strict=True)
        stage = vote_of(*((str(text), 1.0, float(mean)) for text, mean in drawn))
        texts = [each.text for each in stage.candidates]
        ranks = [(texts.count(each.text), each.mean_log_prob, -i) for i, each in enumerate(stage.candidates)]
        winner = _vote(stage, LLAVA_COT, _score_of).winner
        assert winner == ranks.index(max(ranks)) == _vote(stage, LLAVA_COT, lambda _: 1.0).winner
        winners.add(winner)
    assert len(winners) > 4


@pytest.mark.slow
def test_neighbours_and_places_change_no_score(ending, prompts):
    """Two questions in either order, bit for bit, the second without an image."""
    reasoner = Reasoner(*ending, STRATEGY, prompts)
    (image, first), (_, second) = scene(0), scene(1)
    one, two = reasoner.answer_batch([image, None], [first, second], seeds=[3, 4])
    turned = reasoner.answer_batch([None, image], [second, first], seeds=[4, 3])
    assert [plain(answer) for answer in turned] == [plain(two), plain(one)]
    assert one.trace.stages[0].candidates[0].score != two.trace.stages[0].candidates[0].score


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [STRATEGY, WeightedVote(3, max_new_tokens=6)], ids=["stages", "votes"])
def test_probes_are_counted_and_nothing_is_read_twice(ending, prompts, strategy):
    model, processor = ending
    image, question = scene(2)
    tables = build_verifier_tables(processor, scored_stages(strategy.to_spec()), JudgePrompts.load(prompts))
    trace = Reasoner(model, processor, strategy, prompts).answer(image, question).trace
    expected = 0
    for number, stage in enumerate(trace.stages):
        for candidate in stage.candidates:
            closing = candidate.added + "\n\n" if candidate.added else ""
            expected += len(processor.tokenizer(closing, add_special_tokens=False)["input_ids"]) if closing else 0
            expected += int(candidate.tokens > 0) + int(tables.probes.lengths[number])
    assert trace.tokens["verifier_probes"] == expected
    assert trace.flops["verifier_probes"] > 0
    assert trace.tokens["judge_queries"] == trace.flops["judge_prefixes"] == 0


@pytest.mark.slow
def test_a_single_candidate_has_a_score(ending, prompts):
    answer = Reasoner(*ending, BestOfN(1, Verifier(), max_new_tokens=4), prompts).answer(*scene(0))
    assert 0 < answer.trace.stages[0].candidates[0].score < 1


@pytest.mark.slow
def test_the_probe_is_short_and_its_answers_are_natural_in_the_published_vocabulary(published):
    """The workload of ``bench`` counts as many tokens as the shipped probe has."""
    tables = build_verifier_tables(
        published, scored_stages(STRATEGY.to_spec()), JudgePrompts.load(DEFAULT_JUDGE_PROMPTS)
    )
    assert [published.tokenizer.decode(token) for token in tables.answers.tolist()] == [" yes", " no"]
    assert Workload().probe_tokens == tables.probes.capacity


def test_answers_that_are_no_natural_next_token(tmp_path):
    text = DEFAULT_JUDGE_PROMPTS.read_text()
    path = tmp_path / "prompts.yaml"
    path.write_text(text.replace('answers: [" yes", " no"]', "answers: [certainly, never]"))
    _, processor = random_model()
    with pytest.raises(
        UserError, match="after the verifier's stem 'Answer:' the answer 'certainly' is not one natural"
    ):
        RequestBuilder(processor, STRATEGY, path)
    RequestBuilder(processor, StageBeam(2, Judge()), path)  # the judge has no use for them


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('answers: [" yes", " no"]', 'answers: [" yes"]', "probe.answers must be two different texts"),
        ("probe:\n", "probes:\n", "lacks 'probe'; compare it with"),
        ("Is this plan", "\ue000", "probe.questions.SUMMARY has the character U\\+E000"),
        ("    other: Is this part right? Answer yes or no.\n", "", "probe.questions lack other"),
    ],
)
def test_probes_that_cannot_be_used(tmp_path, old, new, message):
    path = tmp_path / "prompts.yaml"
    path.write_text(DEFAULT_JUDGE_PROMPTS.read_text().replace(old, new))
    with pytest.raises(UserError, match=message) as told:
        JudgePrompts.load(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("scorer", [Judge(), LogProbability(), None, Verifier])
def test_a_weighted_vote_needs_a_score_of_each_answer(scorer):
    with pytest.raises(UserError, match="scorer is") as told:
        WeightedVote(scorer=scorer)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_the_probe_must_fit_the_context(ending, prompts):
    """An answer fits that leaves no room for the verifier's question after it."""
    _, processor = ending
    image, question = scene(0)
    context = processor.config.text.max_position_embeddings
    prompt = len(processor([processor.prompt(user_turn(question, 1))], [[image]])["input_ids"][0])
    tokens = context - prompt - 4
    RequestBuilder(processor, BestOfN(2, LogProbability(), max_new_tokens=tokens), prompts).build([image], [question])
    builder = RequestBuilder(processor, BestOfN(2, Verifier(), max_new_tokens=tokens), prompts)
    with pytest.raises(UserError, match="an answer with the verifier's question may take"):
        builder.build([image], [question])
    shrinking = RequestBuilder(processor, BestOfN(2, Verifier()), prompts).build([image], [question])
    assert shrinking.spec.max_new_tokens[0] < tokens


def test_the_plan_counts_the_probes_beside_the_candidates():
    """Their cache comes beside that of the candidates, in the program as in the plan, and takes seconds."""
    model, processor = random_model()
    verified, likely = (BestOfN(3, scorer, max_new_tokens=70).to_spec() for scorer in (Verifier(), LogProbability()))
    work = Workload(prompt_tokens=9, image_tiles=1, stage_tokens=(4,), judge_prompt_tokens=5, probe_tokens=300)
    plans = [plan_search(spec, model.config, parse_topology("v6e-1"), work=work) for spec in (verified, likely)]
    leaf = 1 + 1 + 300  # the last token, and no closing tag, which has room for one token
    chunk = leaf // 2  # 2 * 256 // 3 tokens at most, and two chunks of equal size
    text = model.config.text
    values = 2 * text.num_key_value_heads * text.head_dim * (text.num_hidden_layers - len(text.cross_attention_layers))
    assert plans[0].memory["caches"] - plans[1].memory["caches"] == 3 * (leaf + chunk) * values * 2
    assert plans[0].seconds > plans[1].seconds

    builder = RequestBuilder(processor, BestOfN(3, Verifier(), max_new_tokens=70))
    probe = probe_capacity(builder.scorer_tables.verifier, builder.stage_tables.closings.capacity)
    assert probe + probe_chunk(64, 3, probe) in caches_of_the_program(model, builder)


@pytest.mark.parametrize(
    ("limit", "candidates", "capacity", "chunk"), [(256, 10, 27, 27), (64, 10, 27, 9), (256, 1, 27, 27), (4, 9, 5, 1)]
)
def test_chunks_of_probes_are_of_equal_size(limit, candidates, capacity, chunk):
    assert probe_chunk(limit, candidates, capacity) == chunk


@pytest.mark.slow
@pytest.mark.exhaustive
def test_scores_on_a_mesh(ending, prompts):
    """Greedy candidates are the same everywhere; questions and heads are divided over four devices."""
    model, processor = ending
    strategy = StageBeam(2, Verifier(), temperature=0.0, max_new_tokens=3)
    images, questions = zip(*map(scene, range(2)), strict=True)
    scores = []
    for each in (model, on(make_mesh(2, 1, 2), model)):
        answers = Reasoner(each, processor, strategy, prompts).answer_batch(images, questions)
        scores.append([c.score for answer in answers for stage in answer.trace.stages for c in stage.candidates])
    np.testing.assert_allclose(*scores, atol=1e-4)
    assert len({round(score, 3) for score in scores[0]}) > 4


@pytest.mark.slow
def test_names_of_the_verifiers_parts_in_the_program(ending, prompts):
    """Profiles are read by these names."""
    model, processor = ending
    builder = RequestBuilder(processor, STRATEGY, prompts)
    image, question = scene(0)
    static = {"config": model.config, "spec": builder.spec, "prefill_chunk": 64, "mesh": None}
    inputs = builder.build([image], [question]).inputs
    lowered = search.lower(model.params, inputs, builder.stage_tables, builder.scorer_tables, **static)
    assert "stage/verifier/prefill" in scopes(lowered)


@pytest.mark.slow
def test_only_the_stages_of_the_verifier_are_asked_about(ending, prompts, monkeypatch):
    """The other stages read no probe, and their candidates have no score."""
    found = recorded_results(monkeypatch)
    scorers = (LogProbability(), Verifier(), LogProbability(), Verifier())
    answer = Reasoner(*ending, StageBeam(2, scorers, max_new_tokens=5), prompts).answer(None, "red?", seed=5)
    read = jax.device_get(found[0].scores.probe_lengths)[:, 0]
    assert [row.all() for row in read > 0] == [row.any() for row in read > 0] == [False, True, False, True]
    scored = [[candidate.score is not None for candidate in stage.candidates] for stage in answer.trace.stages]
    assert scored == [[False] * 2, [True] * 2] * 2
