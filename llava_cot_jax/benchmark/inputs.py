"""Models of random weights, and inputs of random tokens and pixels, for benchmarks."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_cot_jax.benchmark.workload import RANDOM_MODELS, TAG_TOKENS, Workload
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import bucket
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, pad
from llava_cot_jax.inference.stop_strings import TAILS
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.program import SearchInputs
from llava_cot_jax.search.prompts import PROMPT_KINDS
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.tables import JudgeTables, ScorerTables, StageTables, VerifierTables, scored_stages


def random_model(name: str, dtype: Any, mesh: jax.sharding.Mesh | None) -> Mllama:
    """Return a model of ``RANDOM_MODELS`` with random weights and open gates."""
    model = Mllama(RANDOM_MODELS[name](), rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh)
    for layer in model.language_model.model.layers.values():
        for gate in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
            if gate in layer:
                layer[gate].set_value(layer[gate].get_value() + jnp.asarray(0.5, dtype))
    return model


def without_eos(config: MllamaConfig) -> MllamaConfig:
    """Return a configuration in which no token ends an answer."""
    return replace(config, text=replace(config.text, eos_token_ids=()))


def random_search_inputs(config: MllamaConfig, work: Workload, questions: int = 1) -> SearchInputs:
    """Return inputs of a search with questions of random tokens and pixels."""
    rng, tower = np.random.default_rng(0), config.vision
    room = bucket(work.prompt_tokens)
    inputs: dict[str, np.ndarray] = {"input_ids": rng.integers(0, config.text.vocab_size, (questions, room), np.int32)}
    if work.image_tiles:
        shape = next(
            (i + 1 for i, (h, w) in enumerate(tower.supported_aspect_ratios) if h * w == work.image_tiles), None
        )
        if shape is None:
            raise UserError(f"the model has no image of {work.image_tiles} tiles")
        size = tower.image_size
        pixels = rng.integers(0, 255, (questions, 1, tower.max_num_tiles, tower.num_channels, size, size), np.uint8)
        used = (np.arange(tower.max_num_tiles) < work.image_tiles).astype(np.int32)
        inputs |= {
            "pixel_values": pixels,
            "aspect_ratio_ids": np.full((questions, 1), shape, np.int32),
            "aspect_ratio_mask": np.broadcast_to(used, (questions, 1, tower.max_num_tiles)),
            "cross_attention_mask": np.broadcast_to(used.astype(np.uint8), (questions, room, 1, tower.max_num_tiles)),
        }
    headers = [[1] * TAG_TOKENS] * questions
    return SearchInputs(
        model_inputs={name: jnp.asarray(x) for name, x in inputs.items()},
        lengths=jnp.full(questions, work.prompt_tokens, jnp.int32),
        seeds=jnp.arange(questions, dtype=jnp.uint32),
        question=pad([[2] * (work.prompt_tokens - TAG_TOKENS)] * questions, capacity=room),
        chat_headers=pad(headers * len(PROMPT_KINDS), (len(PROMPT_KINDS), questions)),
    )


def endless_tables(config: MllamaConfig, work: Workload, spec: SearchSpec) -> tuple[StageTables, ScorerTables]:
    """Return stop tables that never match, so that every candidate is as long as it may be."""
    count, states = spec.num_stages, 2
    tag = [[3] * TAG_TOKENS] if spec.stages else [[]]
    stage_tables = StageTables(
        openings=pad(tag * (count * TAILS), (count, TAILS)),
        closings=pad(tag * (count * (states + TAILS)), (count, states + TAILS)),
        stop_tables=jnp.zeros((count, states, config.text.vocab_size), jnp.uint8),
    )
    verifier_tables, scored = None, len(scored_stages(spec))
    if spec.has_verifier:
        verifier_tables = VerifierTables(probes=pad([[5] * work.probe_tokens] * scored), answers=jnp.arange(2))
    threshold = None if spec.rounds is None else jnp.float32(spec.rounds.threshold)
    judge = spec.judge
    if judge is None:
        return stage_tables, ScorerTables(None, verifier_tables, threshold)

    def part(share: float) -> RaggedTokens:
        shape = (len(PROMPT_KINDS), scored)
        return pad([[4] * max(1, round(share * work.judge_prompt_tokens))] * math.prod(shape), shape)

    # Captions are shown to the judge of reasonings, both to that of conclusions, as in the shipped prompts.
    shows = np.zeros((len(PROMPT_KINDS), scored, scored), bool)
    if spec.max_sentences:
        shows[:, 1, 0] = True
    elif count > 2:
        shows[:, 2, 1] = shows[:, -1, 1:-1] = True
    checked = np.arange(scored) == 2 if judge.writes_reasons else np.zeros(scored, bool)
    judge_tables = JudgeTables(
        intro=part(0.3),
        middle=part(0.02),
        label=part(0.04),
        between=part(0.04),
        ending=part(0.6),
        shows=jnp.asarray(shows),
        checked=jnp.asarray(checked),
        verdicts=jnp.arange(2),
        stop_tables=jnp.zeros((len(PROMPT_KINDS), states, config.text.vocab_size), jnp.uint8),
    )
    return stage_tables, ScorerTables(judge_tables, verifier_tables, threshold)
