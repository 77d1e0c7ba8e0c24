"""The programs that are planned, lowered from shapes alone, as their own commands compile them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.benchmark.inputs import endless_tables, random_search_inputs
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.quantization import is_quantized
from llava_cot_jax.model.sharding import parameter_sharding, partition_spec
from llava_cot_jax.search.program import default_prefill_chunk
from llava_cot_jax.search.reasoner import program_of
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.training.program import TrainProgram
from llava_cot_jax.training.settings import TrainSettings

WeightDtype = Literal["float32", "bfloat16", "float16", "int8"]
"""Dtype of the weights of a model that decodes."""


def abstract_batch(
    config: MllamaConfig, batch_size: int, tokens: int, mesh: Mesh, num_images: int = 1, *, probes: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch of ``Loader``: examples of ``tokens`` tokens with ``num_images`` images each.

    With ``probes``, the data set trains the verifier.
    """
    tower = config.vision
    images = (batch_size, num_images, tower.max_num_tiles)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "input_ids": ((batch_size, tokens), jnp.int32),
        "attention_mask": ((batch_size, tokens), jnp.int32),
        "pixel_values": ((*images, tower.num_channels, tower.image_size, tower.image_size), jnp.uint8),
        "aspect_ratio_ids": (images[:2], jnp.int32),
        "aspect_ratio_mask": (images, jnp.int32),
        "cross_attention_mask": ((batch_size, tokens, *images[1:]), jnp.int32),
        "loss_mask": ((batch_size, tokens), jnp.bool_),
        "stage": ((batch_size, tokens), jnp.int8),
        "row": ((batch_size,), jnp.int32),
    }
    if probes:
        shapes |= {
            "probe": ((batch_size, tokens), jnp.bool_),
            "probe_answers": ((batch_size, 2), jnp.int32),
            "probe_value": ((batch_size,), jnp.float32),
            "probe_weight": ((batch_size,), jnp.float32),
        }
    sharding = NamedSharding(mesh, partition_spec(("batch",)))
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, (shape, kind) in shapes.items()}


def lower_training_step(
    program: TrainProgram, settings: TrainSettings, config: MllamaConfig, mesh: Mesh, num_images: int = 1
) -> jax.stages.Lowered:
    """Lower the training step for the longest batch of examples with ``num_images`` images each."""
    tokens, probes = settings.chat.max_length, settings.lora.tokens == "probe"
    batch = abstract_batch(config, settings.loader.batch_size, tokens, mesh, num_images, probes=probes)
    return program.step.lower(program.state, batch)  # type: ignore[attr-defined]


def abstract_params(config: MllamaConfig, dtype: WeightDtype, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the weights that a model decodes with, by path."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    arrays = {}
    for path, p in parameters(config, "unrolled").items():
        quantized = dtype == "int8" and is_quantized(path)
        kind = jnp.dtype(dtype) if quantized or dtype != "int8" else jnp.dtype(jnp.bfloat16)
        arrays[path] = jax.ShapeDtypeStruct(p.shape, kind, sharding=parameter_sharding(p, mesh))
        if quantized:
            scale = jax.ShapeDtypeStruct(p.shape[:1], jnp.float32, sharding=everywhere)
            arrays[path.removesuffix("weight") + "scale"] = scale
    return arrays


def lower_search(
    config: MllamaConfig, spec: SearchSpec, work: Workload, questions: int, dtype: WeightDtype, mesh: Mesh
) -> jax.stages.Lowered:
    """Lower the whole search for a batch of questions, as ``Reasoner`` compiles it."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    given = jax.eval_shape(lambda: (random_search_inputs(config, work, questions), *endless_tables(config, work, spec)))
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), given)
    params = unflatten_dict(abstract_params(config, dtype, mesh), sep=".")
    static = {"config": config, "spec": spec, "prefill_chunk": default_prefill_chunk(mesh), "mesh": mesh}
    return program_of(spec).lower(params, *given, **static)
