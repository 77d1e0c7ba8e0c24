"""Searches whose candidates are continued: continuations against all that there are, the search against brute force."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.matching import RightAnswer, scored_text
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.search.batches import AnswerBatches
from llava_cot_jax.search.program import candidate_stops, stage_keys
from llava_cot_jax.search.retracing import Retracing
from llava_cot_jax.search.rollout_search import (
    RolloutBuilder,
    StageRollouts,
    continuation_keys,
    continuation_spec,
    roll_out_together,
)
from llava_cot_jax.search.scorers import Verifier
from llava_cot_jax.search.strategies import BestOfN, StageBeam, check_continuable
from llava_cot_jax.search.stream import Question
from llava_cot_jax.stage_format import StageFormat
from llava_cot_jax.values.job import value_stages
from tests.search import brute_force
from tests.search.models import random_model, scene

FORMAT = StageFormat.tagged(("REASONING", "CONCLUSION"))

LAST = 3
"""Number of tokens of a conclusion."""

STRATEGY = StageBeam((2, 3), Verifier(), 1.0, (4, LAST), top_k=2, top_p=1.0, format=FORMAT)

CONTINUATIONS = 300

SEED = 5

CHANCE = 1e-6
"""Probability that a right program fails a comparison of counts, on either side."""


@pytest.fixture(scope="module")
def world(prompts):
    """A random model, and a function that rolls out questions by their places, two at a time."""
    model, processor = random_model(1)
    builder = RolloutBuilder(processor, STRATEGY, prompts)
    asked = [Question(scene(i)[1], scene(i)[0] if i < 2 else None, SEED + i) for i in range(3)]

    def roll_out(*places: int) -> list[list[StageRollouts]]:
        search = partial(roll_out_together, continuations=CONTINUATIONS)
        questions = (asked[place] for place in places)
        made = AnswerBatches(model, builder, questions, size=2, prompt_tokens=128, images=1, search=search)
        return [streamed.answer.rollouts for streamed in made]

    return model, processor, roll_out


@pytest.fixture(scope="module")
def rolled_out(world) -> list[StageRollouts]:
    """The first question, alone."""
    return world[2](0)[0]


@pytest.fixture(scope="module")
def plain(world, prompts) -> brute_force.Search:
    """The same search in plain Python."""
    image, question = scene(0)
    return brute_force.Search(*world[:2], STRATEGY, image, question, SEED, brute_force.JudgePrompts.load(prompts))


def is_even(text: str, _: RightAnswer) -> bool:
    """A way to be right that about half of all texts are."""
    return sum(map(ord, text)) % 2 == 0


def conclusions(search: brute_force.Search, sequence: brute_force.Sequence, ids: list[int]) -> dict[tuple, float]:
    """The probability of each conclusion after ``ids``, of the two likeliest tokens at each place."""
    found, open_ = {}, {(): 1.0}
    for _ in range(LAST):
        following = {}
        for written, probability in open_.items():
            logits = sequence.logits(ids + list(written)).astype(np.float64)
            best = np.argsort(-logits, kind="stable")[:2]
            shares = np.exp(logits[best] - logits[best].max())
            for token, share in zip(best.tolist(), shares / shares.sum(), strict=True):
                is_end = token in search.model.config.text.eos_token_ids
                (found if is_end else following)[written if is_end else (*written, token)] = probability * share
        open_ = following
    return found | open_


@pytest.mark.slow
def test_values_are_those_of_all_continuations(world, rolled_out, plain):
    """Each text as often as the model's probabilities say, and so the value of each candidate."""
    stages = plain.run()
    prompt = plain.ids(plain.processor.prompt(user_turn(plain.question, 1)))
    sequence = brute_force.Sequence(plain.model, plain.processor, prompt, plain.images)
    right = RightAnswer(("even",), is_even)
    values = value_stages([uncut(stage) for stage in rolled_out], right, FORMAT)["stages"]
    reasonings, stage = rolled_out
    cut = [value_stages(rolled_out, right, FORMAT)["stages"][i]["candidates"] for i in range(2)]
    shares = []
    for i, candidate in enumerate(stages[0].candidates):
        before = plain.ids("<REASONING>") + candidate.ids + plain.ids(plain.missing(candidate, "</REASONING>"))
        expected: dict[tuple[str, bool], float] = {}
        whole: dict[str, list[int]] = {}
        for ids, p in conclusions(plain, sequence, prompt + before + plain.ids("<CONCLUSION>")).items():
            text = f"{reasonings.texts[i]}\n\n" + ("<CONCLUSION>" + plain.processor.decode(list(ids))).strip()
            expected[text, len(ids) == LAST] = expected.get((text, len(ids) == LAST), 0) + p
            whole[text] = prompt + before + plain.ids("<CONCLUSION>") + list(ids)
        assert sum(expected.values()) == pytest.approx(1) and len(expected) > 4
        answers = [(answer.text, answer.is_cut) for answer in reasonings.answers[i]]
        assert len(answers) == CONTINUATIONS and set(answers) <= expected.keys()
        for answer, p in expected.items():
            assert_likely(answers.count(answer), p)
        verified = plain.verify(sequence, whole[answers[0][0]], "whole")
        assert np.allclose(reasonings.answer_scores[i], verified, atol=1e-4)
        share = sum(p for (text, _), p in expected.items() if is_even(scored_text(text, FORMAT), right))
        told = values[0]["candidates"][i]
        assert told["value"] == told["right"] / CONTINUATIONS and told["continuations"] == CONTINUATIONS
        assert_likely(told["right"], share)
        ended = [text for text, is_cut in answers if not is_cut]
        assert cut[0][i]["cut"] == CONTINUATIONS - len(ended)
        assert cut[0][i]["right"] == sum(is_even(scored_text(text, FORMAT), right) for text in ended)
        shares.append(share)
    assert min(shares) > 0 and max(shares) < 1
    for told, text, each in zip(values[1]["candidates"], stage.texts, stages[1].candidates, strict=True):
        assert told["cut"] == 0 and cut[1][stage.texts.index(text)]["cut"] == (len(each.ids) == LAST)
        whole = is_even(scored_text(f"{stage.before}\n\n{text}", FORMAT), right)
        assert (told["value"], told["right"], told["continuations"]) == (float(whole), int(whole), 1)


def uncut(stage: StageRollouts) -> StageRollouts:
    """Return a stage as if its answers had come to their ends."""
    return replace(stage, answers=[[replace(answer, is_cut=False) for answer in each] for each in stage.answers])


def assert_likely(count: int, probability: float) -> None:
    """Check that an event of this probability may happen so often in as many draws as there are continuations."""
    low, high = binom.ppf([CHANCE, 1 - CHANCE], CONTINUATIONS, min(probability, 1.0))
    assert low <= count <= high


@pytest.mark.slow
def test_the_search_and_its_scores_are_those_of_brute_force(rolled_out, plain):
    """Candidates, winners, and the verifier's scores of candidates, and of the whole answers of the last stage."""
    prompt = plain.ids(plain.processor.prompt(user_turn(plain.question, 1)))
    sequence = brute_force.Sequence(plain.model, plain.processor, prompt, plain.images)
    before, ids = "", prompt
    for stage, expected, name in zip(rolled_out, plain.run(), FORMAT.names, strict=True):
        added = [plain.missing(candidate, f"</{name}>") for candidate in expected.candidates]
        pairs = list(zip(expected.candidates, added, strict=True))
        texts = [f"<{name}>{plain.text(candidate.ids)}{more}".strip() for candidate, more in pairs]
        assert (stage.texts, stage.winner, stage.before) == (texts, expected.winner, before)
        assert np.allclose(stage.scores, expected.scores, atol=1e-4)
        assert stage.mean_log_probs == pytest.approx([c.log_prob / c.drawn for c, _ in pairs], abs=1e-4)
        whole = [ids + plain.ids(f"<{name}>") + candidate.ids + plain.ids(more) for candidate, more in pairs]
        before, ids = texts[expected.winner], whole[expected.winner]
    assert np.allclose(stage.answer_scores, [plain.verify(sequence, ids, "whole") for ids in whole], atol=1e-4)


@pytest.mark.slow
def test_neighbours_change_nothing(world, rolled_out):
    """Alone, and after and before others of other lengths, with an image or without."""
    roll_out = world[2]
    assert roll_out(1, 0)[1] == rolled_out
    assert roll_out(0, 2)[0] == rolled_out


def test_no_two_draws_share_a_key():
    """Those of candidates and of continuations: so two candidates of one text have continuations of their own."""
    spec, count, questions = STRATEGY.to_spec(), 3, 4
    stop_tables = jnp.zeros((spec.num_stages, 1, 1), jnp.uint8)
    seeds, found = jnp.arange(questions, dtype=jnp.uint32), []
    then = continuation_spec(spec, 5, 1)
    for stage in (jnp.full(questions, number) for number in range(spec.num_stages)):
        keys = continuation_keys(seeds, stage, count)
        draws = [(spec, stage_keys(seeds, stage), stage), (then, keys, jnp.repeat(stage, count))]
        found += [candidate_stops(each, stop_tables, keys, stage).keys for each, keys, stage in draws]
    data = np.concatenate([jax.random.key_data(keys) for keys in found])
    assert len(np.unique(data, axis=0)) == len(data) == spec.num_stages * questions * (count + count * 5)


def test_searches_whose_candidates_cannot_be_continued():
    for strategy in (BestOfN(2), Retracing()):
        with pytest.raises(UserError, match=r"search with stage_beam \(--search stage_beam\)"):
            check_continuable(strategy.to_spec())
    turns = replace(STRATEGY, format=StageFormat.load("llamav_o1"), num_candidates=2, max_new_tokens=4, stages=None)
    with pytest.raises(UserError, match="format llamav_o1 asks for its stages in several turns"):
        check_continuable(turns.to_spec())
