"""Settings that ``plan`` takes besides those of the run that is planned."""

from dataclasses import dataclass

from llava_cot_jax.errors import UserError


@dataclass(frozen=True)
class DatasetSize:
    """Size of the data set, which decides how long a run takes. The defaults are those of LLaVA-CoT-100k.

    Attributes:
        examples: Number of training examples in an epoch.
        tokens_per_example: Mean number of tokens of an example.
        images_per_example: Number of images of each example.

    Raises:
        UserError: A number is below 1.
    """

    examples: int = 98_446
    tokens_per_example: int = 596
    images_per_example: int = 1

    def __post_init__(self) -> None:
        if min(self.examples, self.tokens_per_example, self.images_per_example) < 1:
            raise UserError("examples, tokens_per_example and images_per_example must be at least 1")
