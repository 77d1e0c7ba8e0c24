"""Compile the search with the verifier, and rollouts, with the whole 11B for one v6e, and print their memory.

    pip install -e '.[plan]' && python tests/evidence/compile_verifier.py | tee tests/evidence/compile_verifier.txt

The figures come from the compiler; nothing runs on a TPU. Rollouts sample candidates of a stage after a prompt with an
image, and continuations of each candidate over the same cache.
"""

import datetime
import importlib.metadata

import jax
import jax.numpy as jnp
from compile_search import BUDGET, CONFIG, GB, WORK, report  # type: ignore[import-not-found]
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.benchmark.inputs import endless_tables, random_search_inputs
from llava_cot_jax.inference.decoding import Decoder, Samples, encode_images, prefill
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, pad
from llava_cot_jax.model.kv_cache import KVCache, Segment
from llava_cot_jax.model.sharding import make_mesh, use_mesh
from llava_cot_jax.planning import slices
from llava_cot_jax.planning.programs import abstract_params, lower_search
from llava_cot_jax.search.program import ACCELERATOR_CHUNK, SearchInputs, sample_candidates
from llava_cot_jax.search.rollouts import append_joints, joint_capacity, sample_continuations
from llava_cot_jax.search.scorers import Verifier
from llava_cot_jax.search.strategies import BestOfN, StageBeam

CANDIDATES, CONTINUATIONS, CONTINUATION, JOINT = 4, 16, 590, 8
"""Numbers of candidates and of continuations of each, and tokens of a continuation and of the tags before it."""


def main() -> None:
    slices.enable_tpu_compiler()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    print(f"{datetime.date.today()}; {versions}; compiled for TPUs, run on none")
    slice_ = slices.parse_topology("v6e-1")
    memory = slice_.generation.usable_hbm_bytes / GB
    print(f"11B, bfloat16, one image of 4 tiles, {BUDGET} tokens a stage, on one v6e of {memory:.1f} GB")
    mesh = make_mesh(tensor=1, devices=slice_.devices())
    print(f"rollouts: 1 question, {CANDIDATES} candidates, {CONTINUATIONS} continuations each of {CONTINUATION} tokens")
    report(lower_rollouts(mesh))
    print("the whole search with the verifier, 10 candidates, 1 question", flush=True)
    spec = StageBeam(10, Verifier(), max_new_tokens=BUDGET).to_spec()
    report(lower_search(CONFIG, spec, WORK, 1, "bfloat16", mesh))


def lower_rollouts(mesh: Mesh) -> jax.stages.Lowered:
    first = BestOfN(CANDIDATES, Verifier(), max_new_tokens=BUDGET).to_spec()
    then = BestOfN(CONTINUATIONS, Verifier(), max_new_tokens=CONTINUATION).to_spec()

    @jax.jit
    def rollouts(params, inputs: SearchInputs, stop_tables, keys) -> tuple[Samples, Samples]:
        with use_mesh(mesh):
            images = encode_images(params, CONFIG, inputs.model_inputs, inputs.lengths)
            decoder, stage = Decoder(params, CONFIG, images, ACCELERATOR_CHUNK), jnp.zeros(CANDIDATES, jnp.int32)
            prompt = RaggedTokens(inputs.model_inputs["input_ids"], inputs.lengths)
            room = decoder.init_cache(1, prompt.capacity + ACCELERATOR_CHUNK)
            layers, logits = prefill(decoder, prompt, KVCache(room, jnp.zeros(1, jnp.int32)))
            root, root_keys = Segment(layers, prompt.lengths), jax.vmap(jax.random.key)(inputs.seeds)
            room = decoder.init_cache(CANDIDATES, BUDGET + joint_capacity(JOINT))
            layers, candidates = sample_candidates(
                decoder, first, logits, (root,), room, stop_tables, root_keys, stage[:1]
            )
            chain, joints = (root, Segment(layers, candidates.num_cached)), pad([[3] * JOINT] * CANDIDATES)
            own, logits = append_joints(decoder, chain, candidates, joints)
            used = jnp.ones(CANDIDATES, bool)
            return candidates, sample_continuations(decoder, then, (root, own), logits, used, stop_tables, keys, stage)[
                1
            ]

    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(
        lambda: (
            random_search_inputs(CONFIG, WORK),
            endless_tables(CONFIG, WORK, first)[0].stop_tables,
            jax.random.split(jax.random.key(0), CANDIDATES),
        )
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    return rollouts.lower(unflatten_dict(abstract_params(CONFIG, "bfloat16", mesh), sep="."), *shapes)


if __name__ == "__main__":
    main()
