"""The pieces of the search on their own: a batch may hold questions that are in different stages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_cot_jax.inference.decoding import Decoder
from llava_cot_jax.search.program import SearchState, StageSearch, encode_question_images
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.scorers import Judge
from llava_cot_jax.search.strategies import StageBeam
from tests.search.models import random_model, scene
from tests.tiers import in_tiers

STRATEGIES = {
    "token": StageBeam((3, 2, 1, 4), Judge("token"), temperature=(0.9, 0.0, 1.2, 0.7), max_new_tokens=(6, 5, 7, 4)),
    "rationale": StageBeam((3, 1, 4, 2), Judge("rationale", reason_tokens=7, check_tokens=5), 1.0, (6, 5, 7, 4)),
}


@pytest.mark.parametrize("name", in_tiers(STRATEGIES, suite=["token"]))
def test_questions_in_different_stages_share_a_batch(prompts, name):
    """Each question has the candidates, verdicts and progress of a batch in which all are in its stage, bit for bit.

    The first question is two stages ahead of the second, or behind it.
    """
    model, processor = random_model(1, eos=tuple(range(0, 500, 60)))
    builder = RequestBuilder(processor, STRATEGIES[name], prompts)
    inputs = builder.build(*zip(scene(0), scene(3), strict=True), seeds=[4, 5]).inputs
    images = encode_question_images(model.params, model.config, inputs)

    def pieces(params) -> StageSearch:
        decoder = Decoder(params, model.config, images, 64)
        return StageSearch(decoder, builder.spec, inputs, builder.stage_tables, builder.scorer_tables)

    @jax.jit
    def run_stage(params, state):
        return pieces(params).run_stage(state)

    state = SearchState(pieces(model.params).init_prefix(), pieces(model.params).init_progress())
    before, after = [state], []
    for _ in range(builder.spec.num_stages):
        state, result = run_stage(model.params, state)
        before.append(state)
        after.append((state.progress, result))
    for stages in ((0, 2), (3, 1), (1, 0)):
        mixed = jax.tree.map(lambda x, y: jnp.stack([x[0], y[1]]), *(before[stage] for stage in stages))
        state, result = run_stage(model.params, mixed)
        for question, stage in enumerate(stages):
            same = functools.partial(jax.tree.map, lambda x: np.asarray(x[question]))  # noqa: B023
            jax.tree.map(np.testing.assert_array_equal, same((state.progress, result)), same(after[stage]))
