"""What a benchmark works on: forced lengths, and the sizes of models of random weights."""

from dataclasses import dataclass, fields

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig

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
            if min(value if isinstance(value, tuple) else (value,)) < least:
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
