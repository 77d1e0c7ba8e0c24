"""Workload of a benchmark: forced lengths, and models of random weights."""

from dataclasses import dataclass, fields

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
from llava_cot_jax.rounding import ceil_div

TAG_TOKENS = 4
"""Number of tokens of an opening tag, and of a closing one."""


@dataclass(frozen=True)
class Workload:
    """Lengths of a question and its search. All are forced, since random weights never close a tag.

    Attributes:
        prompt_tokens: Number of tokens of the whole prompt.
        image_tiles: Number of tiles of its image; 0 is a question without an image.
        stage_tokens: Number of tokens of a candidate of each stage.
        reason_tokens: Number of tokens of a judge's written reason.
        check_tokens: Number of tokens of a judge's check of a reasoning.
        judge_prompt_tokens: Number of tokens of the judge's prompt without the question and the candidates.
        sentence_tokens: Number of tokens of a sentence, where an answer is searched for sentence by sentence.
        probe_tokens: Number of tokens of the verifier's question with the beginning of the answer.
        num_candidates: Numbers of candidates to measure.

    Raises:
        UserError: A length is below 1, or a list is empty.
    """

    prompt_tokens: int = 128
    image_tiles: int = 4
    stage_tokens: tuple[int, ...] = (60, 100, 200, 30)
    sentence_tokens: int = 20
    reason_tokens: int = 40
    check_tokens: int = 20
    judge_prompt_tokens: int = 110
    probe_tokens: int = 22
    num_candidates: tuple[int, ...] = (1, 4, 10)

    @property
    def sentences(self) -> int:
        """Number of sentences of an answer with the length of all stages."""
        return ceil_div(sum(self.stage_tokens), self.sentence_tokens)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "image_tiles" else 1
            if not value and field.name in ("stage_tokens", "num_candidates"):
                raise UserError(f"workload.{field.name} must be a list of at least one number")
            if min(value if isinstance(value, tuple) else (value,)) < least:
                raise UserError(f"workload.{field.name} is {value}; it must be at least {least}")
        if self.judge_prompt_tokens < 5:
            raise UserError(f"workload.judge_prompt_tokens is {self.judge_prompt_tokens}; it must be at least 5")


def config_100m() -> MllamaConfig:
    """Model of about 100 million parameters with every part, the vocabulary and the tiles of the published ones."""
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


RANDOM_MODELS = {
    "100m": config_100m,
    "11b": MllamaConfig.llama32_11b,
    "90b": MllamaConfig.llama32_90b,
}
"""Configurations of models whose random weights are made on the device, so that no checkpoint is needed."""
