"""Settings of sampling. This module does not import jax, which is slow."""

from dataclasses import dataclass

from llava_cot_jax.checks import check_int, check_number
from llava_cot_jax.errors import UserError

DEFAULT_MAX_NEW_TOKENS = 2048
"""Longest answer in tokens where no length is given. It shrinks to what a model's context leaves."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling, applied in transformers' order: temperature, then top_k, then top_p.

    Attributes:
        temperature: Divisor of the logits; 0 takes the likeliest token.
        top_k: Number of likeliest tokens to keep; None keeps all. With it, top_p needs no sort of the whole
            vocabulary, which costs a hundred times more.
        top_p: Probability, among the tokens that top_k keeps, up to which the likeliest tokens are kept.

    Raises:
        UserError: A setting is not of its type, or out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        check_number("top_p", self.top_p)
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it must not be negative")
        if self.top_k is not None:
            check_int("top_k", self.top_k)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
