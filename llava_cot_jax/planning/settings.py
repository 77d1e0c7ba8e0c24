"""What is said of a run to those who plan it, besides its own settings."""

from dataclasses import dataclass

from llava_cot_jax.errors import UserError


@dataclass(frozen=True)
class Data:
    """The data set, as far as it decides how long a run takes; the defaults are LLaVA-CoT-100k's.

    Attributes:
        rows: of an epoch.
        tokens: of a row, on average.

    Raises:
        UserError: a number below 1.
    """

    rows: int = 98_446
    tokens: int = 596

    def __post_init__(self) -> None:
        if min(self.rows, self.tokens) < 1:
            raise UserError("data.rows and data.tokens must be at least 1")
