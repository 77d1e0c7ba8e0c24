"""Questions with no image, one and three, alone and side by side: token by token the same under each convention."""

from typing import get_args

import jax
import numpy as np
import pytest

from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.convention import Convention
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.scorers import Judge
from llava_cot_jax.search.strategies import StageBeam
from tests.search.models import random_model, scene
from tests.search.test_search import recorded_results
from tests.tiers import in_tiers

COUNTS = (0, 1, 3)
"""Numbers of images of the questions."""

QUESTIONS = [scene(0)[1], scene(1)[1], scene(2)[1] + " red" * 60]
"""The last is the longest, although a prompt without an image has a system message."""

IMAGES = [[scene(3 * i + j)[0] for j in range(count)] for i, count in enumerate(COUNTS)]
SEEDS = [4, 5, 6]
ALONE = [(0,), (1,), (2, 2, 2)]
"""Questions that are asked without others. Three copies of the one with three images run the program of all three."""

NEW = 24


SAMPLED = Sampling(1.0, top_k=50, top_p=0.9)


@pytest.mark.parametrize("convention", in_tiers(get_args(Convention), suite=["transformers_4"]))
@pytest.mark.parametrize("sampling", in_tiers([Sampling(), SAMPLED], suite=[SAMPLED]), ids=["greedy", "sampled"])
def test_a_generator_answers_each_as_alone(convention, sampling):
    model, processor = random_model(3, convention=convention, eos=(), layers=2)
    generator = Generator(model, sampling)
    prompts = [processor.prompt(user_turn(*each)) for each in zip(QUESTIONS, COUNTS, strict=True)]

    def generate(*places: int) -> np.ndarray:
        inputs = processor([prompts[i] for i in places], [IMAGES[i] for i in places])
        return generator.generate(inputs, max_new_tokens=NEW, seeds=[SEEDS[i] for i in places])

    together = generate(0, 1, 2)
    for i in range(len(COUNTS)):
        np.testing.assert_array_equal(generate(*ALONE[i])[0], together[i])
    assert len({tuple(row) for row in together.tolist()}) == len(COUNTS)


TOKEN, RATIONALE = Judge("token"), Judge("rationale", reason_tokens=6, check_tokens=5)


# transformers_4 differs from transformers_5 in the features of the images alone, and from meta in the text.
SEARCHES = [(each, RATIONALE) for each in get_args(Convention)] + [("meta", TOKEN), ("transformers_5", TOKEN)]


@pytest.mark.parametrize(
    "case",
    in_tiers(SEARCHES, suite=[("transformers_5", RATIONALE)]),
    ids=lambda case: f"{case[0]}-{case[1].verdict}",
)
def test_a_search_answers_each_as_alone(prompts, monkeypatch, case):
    found, (convention, judge) = recorded_results(monkeypatch), case
    model, processor = random_model(3, convention=convention, eos=tuple(range(0, 500, 60)), layers=2)
    reasoner = Reasoner(model, processor, StageBeam(3, judge, temperature=1.0, max_new_tokens=8), prompts)
    answers = reasoner.answer_batch(IMAGES, QUESTIONS, seeds=SEEDS)
    for i, answer in enumerate(answers):
        images, questions, seeds = ([x[j] for j in ALONE[i]] for x in (IMAGES, QUESTIONS, SEEDS))
        alone = reasoner.answer_batch(images, questions, seeds=seeds)
        assert {each.text for each in alone} == {answer.text}
        beside, own = (jax.device_get(result) for result in (found[0], found[-1]))
        for name in ("tokens", "lengths", "ended"):
            one, other = (getattr(result.candidates, name) for result in (own, beside))
            np.testing.assert_array_equal(one[:, 0], other[:, i])
        np.testing.assert_array_equal(own.winner[:, 0], beside.winner[:, i])
        np.testing.assert_allclose(own.candidates.log_prob[:, 0], beside.candidates.log_prob[:, i], atol=1e-3)
