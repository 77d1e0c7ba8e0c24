"""Continuations of candidates, sampled over a chain of segments, against sampling after a plain prefix."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_cot_jax.inference.decoding import Decoder, Samples, encode_images, prefill
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, pad
from llava_cot_jax.model.kv_cache import KVCache, Segment
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.search.program import sample_candidates
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.rollouts import append_joints, joint_capacity, sample_continuations
from llava_cot_jax.search.scorers import LogProbability
from llava_cot_jax.search.strategies import BestOfN
from tests.search import brute_force
from tests.search.models import random_model, scene

CANDIDATES, CONTINUATIONS, LONGEST, CHUNK = 4, 3, 9, 8


@pytest.mark.slow
@pytest.mark.exhaustive
def test_continuations_of_candidates_are_those_after_a_plain_prefix(prompts):
    """Four candidates of different lengths, one of them empty, a tag, and three continuations of each."""
    model, processor = random_model(1, eos=tuple(range(0, 500, 20)))
    image, question = scene(3)
    first = BestOfN(CANDIDATES, LogProbability(), temperature=1.0, max_new_tokens=LONGEST)
    then = replace(first, num_candidates=CONTINUATIONS)
    builder = RequestBuilder(processor, first, prompts)
    inputs = builder.build([image], [question], 52).inputs
    stop_tables = builder.stage_tables.stop_tables
    keys = jax.random.split(jax.random.key(7), CANDIDATES)
    params, config = model.params, model.config
    tag = processor.tokenizer("\n\n<REASONING>", add_special_tokens=False)["input_ids"]

    @jax.jit
    def rollouts(params, inputs) -> tuple[Samples, Samples]:
        images = encode_images(params, config, inputs.model_inputs, inputs.lengths)
        decoder = Decoder(params, config, images, CHUNK)
        prompt, none = RaggedTokens(inputs.model_inputs["input_ids"], inputs.lengths), jnp.zeros(1, jnp.int32)
        layers, logits = prefill(decoder, prompt, KVCache(decoder.init_cache(1, prompt.capacity + CHUNK), none))
        root = Segment(layers, prompt.lengths)
        room = decoder.init_cache(CANDIDATES, LONGEST + joint_capacity(len(tag)))
        stage, root_keys = jnp.zeros(CANDIDATES, jnp.int32), jax.vmap(jax.random.key)(inputs.seeds)
        layers, candidates = sample_candidates(
            decoder, first.to_spec(), logits, (root,), room, stop_tables, root_keys, stage[:1]
        )
        chain, joints = (root, Segment(layers, candidates.num_cached)), pad([tag] * CANDIDATES)
        own, logits = append_joints(decoder, chain, candidates, joints)
        used = jnp.ones(CANDIDATES, bool)
        _, continuations = sample_continuations(
            decoder, then.to_spec(), (root, own), logits, used, stop_tables, keys, stage
        )
        return candidates, continuations

    candidates, continuations = jax.device_get(rollouts(params, inputs))
    assert len(set(candidates.lengths.tolist())) > 1 and candidates.lengths.min() == 0

    plain = brute_force.Search(model, processor, then, image, question, 5, JudgePrompts.load(prompts))
    ids = plain.ids(processor.prompt(user_turn(question, 1)))
    sequence, different = brute_force.Sequence(model, processor, ids, [image]), set()
    for row in range(CANDIDATES * CONTINUATIONS):
        group = row // CONTINUATIONS
        prefix = ids + candidates.tokens[group, : candidates.lengths[group]].tolist() + tag
        key = jax.random.fold_in(jax.random.fold_in(keys[group], brute_force.CANDIDATE), row % CONTINUATIONS)
        want = plain.write(sequence, prefix, key, LONGEST, 1.0, lambda text: "</CONCLUSION>" in text)
        got = continuations.tokens[row, : continuations.lengths[row]].tolist()
        assert got == want.ids, row
        assert continuations.log_prob[row] == pytest.approx(want.log_prob, abs=2e-3)
        different.add(tuple(got))
    assert len(different) > CANDIDATES
    assert np.asarray(continuations.lengths).min() < LONGEST
