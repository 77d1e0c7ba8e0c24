"""The programs that are planned, as their own commands compile them: of shapes alone, without an array."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_cot_jax.benchmark.inputs import request, tables
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.parameters import nest, parameters
from llava_cot_jax.model.quantization import is_quantized
from llava_cot_jax.model.sharding import parameter_sharding, partition
from llava_cot_jax.search.program import search
from llava_cot_jax.search.reasoner import chunk_for
from llava_cot_jax.search.strategies import Plan
from llava_cot_jax.training.program import Program
from llava_cot_jax.training.settings import TrainSettings

Weight = Literal["float32", "bfloat16", "float16", "int8"]
"""What weights are held in to decode."""


def abstract_batch(config: MllamaConfig, rows: int, tokens: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch as ``Loader`` yields it: ``rows`` of ``tokens`` with an image each."""
    tower = config.vision
    images = (rows, 1, tower.max_num_tiles)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "input_ids": ((rows, tokens), jnp.int32),
        "attention_mask": ((rows, tokens), jnp.int32),
        "pixel_values": ((*images, tower.num_channels, tower.image_size, tower.image_size), jnp.uint8),
        "aspect_ratio_ids": (images[:2], jnp.int32),
        "aspect_ratio_mask": (images, jnp.int32),
        "cross_attention_mask": ((rows, tokens, *images[1:]), jnp.int32),
        "loss_mask": ((rows, tokens), jnp.bool_),
        "stage": ((rows, tokens), jnp.int8),
        "row": ((rows,), jnp.int32),
    }
    sharding = NamedSharding(mesh, partition(("batch",)))
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, (shape, kind) in shapes.items()}


def lowered_step(program: Program, settings: TrainSettings, config: MllamaConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The training step for its longest batch."""
    batch = abstract_batch(config, settings.loader.batch, settings.chat.max_length, mesh)
    return program.step.lower(program.state, batch)  # type: ignore[attr-defined]


def abstract_weights(config: MllamaConfig, dtype: Weight, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The weights that a model decodes with, by path."""
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


def lowered_search(
    config: MllamaConfig, plan: Plan, work: Workload, questions: int, dtype: Weight, mesh: Mesh
) -> jax.stages.Lowered:
    """The whole search for a batch of questions, as ``Reasoner`` compiles it."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    given = jax.eval_shape(lambda: (request(config, work, questions), *tables(config, work, plan)))
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), given)
    params = nest(abstract_weights(config, dtype, mesh))
    return search.lower(params, *given, config=config, plan=plan, chunk=chunk_for(mesh), mesh=mesh)
