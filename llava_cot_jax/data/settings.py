"""What is said of data to commands: what to prepare of what, and how rows become tokens and batches."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import is_remote

Variant = Literal["staged", "untagged", "conclusion"]
"""What of a staged answer is trained: all of it, all of it without the tags, or the conclusion alone."""


@dataclass(frozen=True)
class ChatSettings:
    """How turns become tokens.

    Attributes:
        variant: what of a staged answer is kept (the ablations of the LLaVA-CoT paper, table 3). An
            answer without tags is kept whole in each.
        max_length: tokens of a conversation, the image's one included. A longer one loses whole
            turns from its end; one whose first answer does not fit is left out.
        upstream: as PKU-YuanGroup/LLaVA-CoT trains: a second BOS, and the blank line after an
            assistant's header is trained on too.

    Raises:
        UserError: an unknown variant, or a length that holds nothing.
    """

    variant: Variant = "staged"
    max_length: int = 2048
    upstream: bool = False

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise UserError(f"variant is {self.variant!r}; it is one of {', '.join(get_args(Variant))}")
        if self.max_length < 1:
            raise UserError(f"max_length is {self.max_length}; it must be at least 1")


@dataclass(frozen=True)
class LoaderSettings:
    """How rows become batches.

    Attributes:
        batch: rows of a global batch.
        buckets: how many lengths batches may have; a step is compiled for each.
        multiple: each of these lengths is a multiple of it, in tokens.
        seed: of the order of rows and batches.
        workers: processes that decode; with 0, threads of this process do.
        threads: that work at once, each on a batch of its own, in this process or in each worker.

    Raises:
        UserError: a number that is too small.
    """

    batch: int = 32
    buckets: int = 6
    multiple: int = 128
    seed: int = 42
    workers: int = 0
    threads: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in ("seed", "workers") else 1
            if value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class Request:
    """What to prepare of what. Not part of it: how many rows may be left out, and the workers.

    Attributes:
        annotations: a JSON Lines file in LLaVA's format.
        images: a folder, a zip, or what stands for the parts of a split zip.
        output: the directory to make, on a disk.
        max_side: pixels; larger images are shrunk to so many on their longest side.
        limit: use so many lines only, from the first.
        validation_share: of the images, drawn by a hash of their paths; rows follow their image.

    Raises:
        UserError: a number that means nothing, or an output in a bucket.
    """

    annotations: Path
    images: Path
    output: Path
    max_side: int | None = None
    limit: int | None = None
    validation_share: float = 0.01

    def __post_init__(self) -> None:
        for name in ("max_side", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.validation_share < 1:
            raise UserError(f"validation_share is {self.validation_share}; it must be at least 0 and less than 1")
        if is_remote(self.output):
            raise UserError(
                "output is in a bucket, and data is prepared on a disk: name a local folder, then copy it by "
                "`gcloud storage cp -r FOLDER gs://BUCKET`"
            )
