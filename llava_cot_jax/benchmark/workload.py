"""What a benchmark works on: forced lengths, a model of real or random weights, and a question of noise."""

from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.decode import bucket
from llava_cot_jax.search.pieces import Pieces, pack
from llava_cot_jax.search.program import Request
from llava_cot_jax.search.prompts import KINDS
from llava_cot_jax.search.readers import TAILS
from llava_cot_jax.search.strategies import Plan
from llava_cot_jax.search.tables import JudgeTables, StageTables

TAG_TOKENS = 4
"""Of an opening tag, and of a closing one."""


@dataclass(frozen=True)
class Workload:
    """What a question comes to, in tokens. Random weights never close a tag, so all lengths are forced.

    Attributes:
        prompt: of the question, with all that stands around it.
        tiles: of its one image; 0 is a question without an image.
        stages: of a candidate of each stage.
        reason: of a judge's written reason.
        check: of a judge's check of a reasoning.
        judge_words: of the judge's prompt, besides the question and the candidates.
        candidates: no tokens: the numbers of candidates to try.

    Raises:
        UserError: a length below 1, or none where there must be some.
    """

    prompt: int = 128
    tiles: int = 4
    stages: tuple[int, ...] = (60, 100, 200, 30)
    reason: int = 40
    check: int = 20
    judge_words: int = 110
    candidates: tuple[int, ...] = (1, 4, 10)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "tiles" else 1
            if not value and field.name in ("stages", "candidates"):
                raise UserError(f"a workload's {field.name} must be a list of at least one number")
            if min(np.atleast_1d(value)) < least:
                raise UserError(f"a workload's {field.name} must be at least {least}, got {value}")
        if self.judge_words < 5:
            raise UserError(f"a workload's judge_words must be at least 5, got {self.judge_words}")


def config_100m() -> MllamaConfig:
    """A model of about 100 million parameters with every part of the published ones, and their vocabulary and tiles."""
    return MllamaConfig(
        vision=VisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            attention_heads=4,
            num_hidden_layers=4,
            num_global_layers=1,
            image_size=560,
            intermediate_layers_indices=(1, 2),
        ),
        text=TextConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=10,
            num_attention_heads=4,
            num_key_value_heads=2,
            cross_attention_layers=(3, 8),
        ),
        convention="transformers_5",
    )


RANDOM = {
    "100m": config_100m,
    "11b": MllamaConfig.llama32_11b,
    "90b": MllamaConfig.llama32_90b,
}
"""Models whose weights are made on the device, so that no checkpoint is needed."""


def random_model(name: str, dtype: Any, mesh: jax.sharding.Mesh | None) -> Mllama:
    """A model of ``RANDOM`` with random weights and open gates."""
    model = Mllama(RANDOM[name](), rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh)
    for layer in model.language_model.model.layers.values():
        for gate in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
            if gate in layer:
                layer[gate].set_value(layer[gate].get_value() + jnp.asarray(0.5, dtype))
    return model


def endless(config: MllamaConfig) -> MllamaConfig:
    """The same model, whose answers no token ends."""
    return replace(config, text=replace(config.text, eos_token_ids=()))


def request(config: MllamaConfig, work: Workload, questions: int = 1) -> Request:
    """Questions of random tokens and pixels."""
    rng, tower = np.random.default_rng(0), config.vision
    room = bucket(work.prompt)
    inputs: dict[str, np.ndarray] = {"input_ids": rng.integers(0, config.text.vocab_size, (questions, room), np.int32)}
    if work.tiles:
        shape = next((i + 1 for i, (h, w) in enumerate(tower.supported_aspect_ratios) if h * w == work.tiles), None)
        if shape is None:
            raise UserError(f"the model has no image of {work.tiles} tiles")
        size = tower.image_size
        pixels = rng.integers(0, 255, (questions, 1, tower.max_num_tiles, tower.num_channels, size, size), np.uint8)
        used = (np.arange(tower.max_num_tiles) < work.tiles).astype(np.int32)
        inputs |= {
            "pixel_values": pixels,
            "aspect_ratio_ids": np.full((questions, 1), shape, np.int32),
            "aspect_ratio_mask": np.broadcast_to(used, (questions, 1, tower.max_num_tiles)),
            "cross_attention_mask": np.broadcast_to(used.astype(np.uint8), (questions, room, 1, tower.max_num_tiles)),
        }
    lead = [[1] * TAG_TOKENS] * questions
    return Request(
        inputs={name: jnp.asarray(x) for name, x in inputs.items()},
        lengths=jnp.full(questions, work.prompt, jnp.int32),
        seeds=jnp.arange(questions, dtype=jnp.uint32),
        question=pack([[2] * (work.prompt - TAG_TOKENS)] * questions, capacity=room),
        leads=pack(lead * len(KINDS), (len(KINDS), questions)),
    )


def tables(config: MllamaConfig, work: Workload, plan: Plan) -> tuple[StageTables, JudgeTables | None]:
    """Tables by which nothing is ever found, so that budgets alone end what is written."""
    count, states = len(plan.budgets), 2
    tag = [[3] * TAG_TOKENS] if plan.stages else [[]]
    stages = StageTables(
        openings=pack(tag * (count * TAILS), (count, TAILS)),
        closings=pack(tag * (count * (states + TAILS)), (count, states + TAILS)),
        readers=jnp.zeros((count, states, config.text.vocab_size), jnp.uint8),
    )
    judge = plan.judge
    if judge is None:
        return stages, None

    def part(share: float) -> Pieces:
        return pack([[4] * max(1, round(share * work.judge_words))] * (len(KINDS) * count), (len(KINDS), count))

    # Captions are shown to the judge of reasonings, both to that of conclusions, as in the shipped prompts.
    shows = np.zeros((len(KINDS), count, count), bool)
    if count > 2:
        shows[:, 2, 1] = shows[:, -1, 1:-1] = True
    checked = np.arange(count) == 2 if judge.verdict == "rationale" else np.zeros(count, bool)
    judging = JudgeTables(
        intro=part(0.3),
        middle=part(0.02),
        label=part(0.04),
        between=part(0.04),
        ending=part(0.6),
        shows=jnp.asarray(shows),
        checked=jnp.asarray(checked),
        verdicts=jnp.arange(2),
        readers=jnp.zeros((len(KINDS), states, config.text.vocab_size), jnp.uint8),
    )
    return stages, judging
