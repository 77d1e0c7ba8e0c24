"""Settings of the data: how a data set is prepared, and how its rows become tokens and batches."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import is_remote

Variant = Literal["staged", "untagged", "conclusion"]
"""Parts of a staged answer that are trained on: all of it, all of it without the tags, or the conclusion alone."""


Targets = Literal["soft", "hard"]
"""Targets of a verifier: the value of a candidate, or whether its value is at least one half."""


@dataclass(frozen=True)
class VerifierSettings:
    """Verifier: how it learns from data sets of values, which ``llava-cot rollout`` writes.

    Attributes:
        weight: Factor of the mean loss of the verifier's replies, each by its own weight, beside the mean loss of the
            answers' tokens.
        targets: Probability of yes to train: the candidate's value (``soft``), or 1 if it is at least one half and 0
            otherwise (``hard``).
        stage_weights: Weight of the candidates of a stage, or of ``whole`` answers, by its name; 0 leaves them out. By
            default, all candidates of each stage together weigh 1.
        judge_prompts: YAML file with the question to the verifier. By default, the package's own.

    Raises:
        UserError: A value is out of range.
    """

    weight: float = 1.0
    targets: Targets = "soft"
    stage_weights: dict[str, float] = field(default_factory=dict)
    judge_prompts: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise UserError(f"verifier.weight is {self.weight}; it must be above 0")
        if self.targets not in get_args(Targets):
            raise UserError(f"verifier.targets is {self.targets!r}; it is one of {', '.join(get_args(Targets))}")
        for stage, weight in self.stage_weights.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"verifier.stage_weights of {stage} is {weight}; it must not be negative")


@dataclass(frozen=True)
class ChatSettings:
    """Chat: how conversations become tokens.

    Attributes:
        variant: Parts of a staged answer that are kept (the ablations of the LLaVA-CoT paper, table 3). An answer
            without tags is kept whole in each.
        max_length: Maximum number of tokens of a conversation, including the image token. A longer conversation
            loses whole turns from its end; one whose first answer does not fit is skipped.
        max_images: Maximum number of images of a conversation. A conversation with more is skipped.
        text_only: Train on conversations without an image too. Otherwise they are skipped, as upstream does.
        upstream_quirks: Train as PKU-YuanGroup/LLaVA-CoT does: with a second BOS, and also on the blank line after
            an assistant's header.

    Raises:
        UserError: The variant is unknown, the length holds nothing, or the number of images is not positive.
    """

    variant: Variant = "staged"
    max_length: int = 2048
    max_images: int = 8
    text_only: bool = True
    upstream_quirks: bool = False

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise UserError(f"variant is {self.variant!r}; it is one of {', '.join(get_args(Variant))}")
        for name in ("max_length", "max_images"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class LoaderSettings:
    """Loader: how examples become batches.

    Attributes:
        batch_size: Number of examples in a global batch.
        num_buckets: Number of lengths that batches may have. A step is compiled for each.
        num_image_buckets: Number of images per example that batches may have, apart from none. A step is compiled
            for each, with each length; an example with fewer images than its batch is padded.
        pad_to_multiple_of: Number of tokens to a multiple of which the lengths of batches are rounded up.
        seed: Seed of the order of examples and batches.
        num_workers: Number of processes that decode images; with 0, threads of this process do.
        num_threads: Number of threads in this process or in each worker, each at work on a batch of its own.

    Raises:
        UserError: A number is too small.
    """

    batch_size: int = 32
    num_buckets: int = 6
    num_image_buckets: int = 2
    pad_to_multiple_of: int = 128
    seed: int = 42
    num_workers: int = 0
    num_threads: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in ("seed", "num_workers") else 1
            if value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class PrepareSettings:
    """Settings that decide the content of a prepared data set.

    Attributes:
        annotations: File of JSON Lines, or of one JSON array, in LLaVA's format.
        images: Folder of images, zip file, or a path that ``split_zip.find_parts`` accepts for a split zip.
        output: Folder to make, on a local disk.
        max_side: Longest side in pixels of a written image; larger images are shrunk, also those that are too large
            to be decoded otherwise. None keeps every size.
        limit: Number of lines to use, from the first. None uses all.
        validation_share: Share of the images that are for validation, drawn by a hash of their paths. Rows follow
            their image.

    Raises:
        UserError: A number is out of its range, or a path is in a bucket.
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
        if remote := [path for path in (self.annotations, self.images) if is_remote(path)]:
            raise UserError(f"{remote[0]} is in a bucket, and raw data are read from a disk: copy it here first")
        if is_remote(self.output):
            raise UserError(
                "output is in a bucket, and data is prepared on a disk: name a local folder, then copy it by "
                "`gcloud storage cp -r FOLDER gs://BUCKET`"
            )
