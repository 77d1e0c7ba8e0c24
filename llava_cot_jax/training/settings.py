"""Settings of a training run: every field of its configuration file."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from llava_cot_jax.data.settings import ChatSettings, LoaderSettings, VerifierSettings
from llava_cot_jax.data.sources import SHAPES_DATA
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.folder import absolute_name
from llava_cot_jax.model.choices import MESH_AXES, Dtype, RematPolicy
from llava_cot_jax.model.convention import Convention
from llava_cot_jax.paths import as_path

Schedule = Literal["step", "cosine", "linear"]
Precision = Literal["float32", "bfloat16_stochastic", "bfloat16_nearest"]
LoraTokens = Literal["all", "probe"]
ComputeDtype = Literal["bfloat16", "float32"]
"""Dtype of the computation of a step."""


@dataclass(frozen=True)
class MeshSettings:
    """Mesh: how many devices each axis has.

    Attributes:
        data: Number of replicas of the model. Between slices, this axis runs over the data center network.
        fsdp: Number of shards that parameters and the batch are cut into. By default, all remaining devices.
        tensor: Number of shards that attention heads, MLP widths and the vocabulary are cut into.

    Raises:
        UserError: An axis has fewer than one device.
    """

    data: int = 1
    fsdp: int | None = None
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in MESH_AXES:
            if (size := getattr(self, axis)) is not None and size < 1:
                raise UserError(f"mesh.{axis} is {size}; it must be at least 1")


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints: how often the training state is saved, and which saved states are kept.

    Attributes:
        every: Number of steps between checkpoints. The last step is always saved.
        max_to_keep: Number of the most recent checkpoints to keep.
        keep_period: Checkpoints whose step is a multiple of this number are kept too; 0 keeps none of them.
        best_n: Number of checkpoints with the lowest validation loss to keep too, among the validated steps.

    Raises:
        UserError: A value is out of range.
    """

    every: int = 1000
    max_to_keep: int = 2
    keep_period: int = 0
    best_n: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("max_to_keep", 1), ("keep_period", 0), ("best_n", 0)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"checkpoints.{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer: AdamW (Loshchilov and Hutter, arXiv 1711.05101), by default with LLaVA-CoT's own recipe.

    Attributes:
        learning_rate: Highest learning rate of the schedule.
        schedule: Schedule of the learning rate. ``step`` multiplies it by ``epoch_decay`` after each epoch;
            ``cosine`` and ``linear`` lower it to ``final_lr_ratio`` of itself over all steps.
        epoch_decay: Factor applied to the learning rate after each epoch, with schedule ``step``.
        final_lr_ratio: Ratio of the last learning rate to the highest, with schedule ``cosine`` or ``linear``.
        warmup_steps: Number of steps over which the learning rate first rises from 0.
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Constant added to the square root of the second moment.
        weight_decay: Weight decay of a step, in units of the learning rate. It applies to matrices, not to norms,
            gates and biases.
        max_grad_norm: Global norm to which larger gradients are scaled down; 0 leaves gradients as they are.
        precision: Precision of parameters and moments between steps. ``bfloat16_stochastic`` halves their memory
            and is right on average. ``bfloat16_nearest`` is what upstream trained with, for comparison: a second
            moment then hardly decays (b2 = 0.999 is less than half a unit in the last place), and an update of
            1e-5 is rounded away for most weights.

    Raises:
        UserError: A value is out of range.
    """

    learning_rate: float = 1e-5
    schedule: Schedule = "step"
    epoch_decay: float = 0.85
    final_lr_ratio: float = 0.0
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name, known in (("schedule", get_args(Schedule)), ("precision", get_args(Precision))):
            if getattr(self, name) not in known:
                raise UserError(f"optimizer.{name} is {getattr(self, name)!r}; it is one of {', '.join(known)}")
        for name in ("learning_rate", "epoch_decay", "final_lr_ratio", "warmup_steps", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.eps <= 0:
            raise UserError(f"optimizer.eps is {self.eps}; it must be above 0")

    @property
    def dtype(self) -> Dtype:
        """Dtype in which parameters and moments are kept between steps."""
        return "float32" if self.precision == "float32" else "bfloat16"


@dataclass(frozen=True)
class LoraSettings:
    """LoRA: which weights get adapters, and how large these are. With a rank, only adapters are trained.

    Attributes:
        rank: Rank of every adapter; 0 trains whole parameters without adapters.
        alpha: Scale of the adapters' output, which is divided by the rank, so that another rank needs no other
            learning rate.
        targets: Regular expressions of projections that get an adapter: those in whose name one is found. The
            default, all projections of the language model, is what it takes to reach full fine-tuning (Dettmers
            et al., arXiv 2305.14314).
        tokens: Tokens that the adapters act on: ``all``, or those of the verifier's question alone (``probe``), so that
            the model answers as before.

    Raises:
        UserError: A value is out of range.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["language_model.*_proj"])
    tokens: LoraTokens = "all"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank is {self.rank}; it must not be negative (0 is no LoRA)")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha is {self.alpha}; it must be above 0")
        if not self.targets:
            raise UserError("lora.targets is empty: name the projections that are to get an adapter")
        if self.tokens not in get_args(LoraTokens):
            raise UserError(f"lora.tokens is {self.tokens!r}; it is one of {', '.join(get_args(LoraTokens))}")
        if self.tokens == "probe" and not self.rank:
            raise UserError("lora.tokens is probe, but lora.rank is 0: set the rank of the verifier's adapter")

    @property
    def scale(self) -> float:
        """Factor of the adapters' output, alpha / rank; 1 without adapters."""
        return self.alpha / self.rank if self.rank else 1.0


@dataclass(frozen=True)
class TrainSettings:
    """Training run: its model, data, length and precision.

    Attributes:
        output: Folder of the run, which takes its configuration, checkpoints, metrics, and the files of the model
            beside its weights. With several hosts, it is one that all of them see, such as a bucket.
        checkpoint: Checkpoint to start from: a folder in Hugging Face form, an id on the hub, a bucket path, or
            ``shapes`` for the small model of the package.
        data: Data set to train on: a folder made by ``llava-cot prepare``, or ``shapes`` for generated pictures; or,
            to train a verifier, a folder of values made by ``llava-cot rollout``. Several are given with a weight
            each, as ``{"data/one": 1, "data/two": 2.5}``: the number of times that each of their rows comes in an
            epoch. With a fraction, each epoch has another share of the rows.
        validation_data: Data set to validate on: its validation split or, if it has none, all of its rows; of values
            that are not in ``data``, all rows too. By default, the validation split of ``data``; with several data
            sets, as many rows of each.
        random_init: Start from random weights; only the configuration, tokenizer and image settings of
            ``checkpoint`` are used.
        convention: Convention that the weights were trained with, where their config.json does not state it.
        epochs: Number of times that each example is seen.
        steps: Number of steps in place of the number that follows from ``epochs``.
        seed: Seed of random weights and adapters. The order of the data has its own, ``loader.seed``.
        dtype: Dtype of the computation.
        remat: Activations of a layer that are saved for the backward pass: what its products and its attention need
            (``none``), the results of its matrix products (``dots``), or its input alone (``full``). The rest is
            recomputed: with ``none`` norms and activation functions, with ``dots`` also attention, with ``full`` all.
        grad_accum_steps: Number of micro-batches that a batch is computed in, one after the other.
        frozen_params: Regular expressions of parameters that are not trained: those in whose name one is found.
            Layers are stacked in these names: ``layers.3`` stands for layers 3, 8, 13 and so on of the 11B.
        max_nonfinite_steps: Number of consecutive steps with a loss or gradient that is not finite that ends the run.
        eval_every: Number of steps between validations; 0 validates only at the end.
        eval_examples: Number of examples to validate on, the first of those set aside; 0 leaves validation out.
        log_every: Number of steps between printed lines where the output is not a terminal with a progress bar.
        eval_generations: Number of validation questions to answer at the end, to count how many captions and
            conclusions match; 0 leaves this out.
        profile: Write a profiler trace of a few steps to the folder of the run.
        wandb: Weights & Biases project to log to as well.
        checkpoints: Checkpoints: how often the training state is saved, and which saved states are kept.
        mesh: Mesh: how many devices each axis has.
        chat: Chat: how conversations become tokens.
        loader: Loader: how examples become batches.
        optimizer: Optimizer: AdamW, its learning rate schedule and its precision.
        lora: LoRA: which weights get adapters, and how large these are.
        verifier: Verifier: how it learns from data sets of values, which ``llava-cot rollout`` writes.

    Raises:
        UserError: A value is out of range, or two values contradict each other.
    """

    output: str
    checkpoint: str
    data: dict[str, float] | str
    validation_data: str | None = None
    random_init: bool = False
    convention: Convention | None = None
    epochs: int = 3
    steps: int | None = None
    seed: int = 0
    dtype: ComputeDtype = "bfloat16"
    remat: RematPolicy = "full"
    grad_accum_steps: int = 1
    frozen_params: list[str] = field(default_factory=list)
    max_nonfinite_steps: int = 5
    eval_every: int = 1000
    eval_examples: int = 1000
    log_every: int = 10
    eval_generations: int = 0
    profile: bool = False
    wandb: str | None = None
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    chat: ChatSettings = field(default_factory=ChatSettings)
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    verifier: VerifierSettings = field(default_factory=VerifierSettings)

    def __post_init__(self) -> None:
        for name in ("epochs", "grad_accum_steps", "max_nonfinite_steps", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("seed", "eval_every", "eval_examples", "eval_generations"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not isinstance(self.data, str):
            self._check_weights(self.data)
        elif self.data[:1] in ("[", "{") and self.data[-1:] in ("]", "}"):
            raise UserError(
                f"data is {self.data}; several data sets are given with a number each, their weight, as in "
                '{"data/one": 1, "data/two": 2.5}'
            )
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps is {self.steps}; it must be at least 1, or left out")
        for name, kind in (("dtype", ComputeDtype), ("remat", RematPolicy)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(get_args(kind))}")
        if self.checkpoints.best_n and not self.eval_examples:
            raise UserError("checkpoints.best_n is set, but eval_examples is 0: nothing tells which are best")
        if self.loader.batch_size % self.grad_accum_steps:
            raise UserError(
                f"grad_accum_steps is {self.grad_accum_steps}; it must divide "
                f"loader.batch_size, {self.loader.batch_size}"
            )
        if self.lora.rank and self.frozen_params:
            raise UserError(
                "frozen_params is set, and lora.rank: with adapters, all else is frozen; leave one of them out"
            )

    @staticmethod
    def _check_weights(weights: Mapping[str, float]) -> None:
        if not weights:
            raise UserError("data names no data set: name one, or several with a weight each")
        for name, weight in weights.items():
            if not 0 < weight < math.inf:
                raise UserError(f"the weight of data {name} is {weight}; it must be above 0")

    def with_absolute_paths(self) -> "TrainSettings":
        """Return the same settings, with paths that mean the same from any working directory.

        Raises:
            UserError: ``as_path`` refuses a path.
        """
        return replace(
            self,
            output=str(as_path(self.output)),
            data=map_names(_absolute, self.data),
            validation_data=None if self.validation_data is None else _absolute(self.validation_data),
            checkpoint=absolute_name(self.checkpoint),
            verifier=replace(
                self.verifier,
                judge_prompts=self.verifier.judge_prompts and str(as_path(self.verifier.judge_prompts)),
            ),
        )


def map_names(function: Callable[[str], str], data: Any) -> Any:
    """Return a name, or the keys of the names with a weight each that ``TrainSettings.data`` takes, changed.

    Raises:
        UserError: Two keys become the same.
    """
    if not isinstance(data, Mapping):
        return function(data)
    changed: dict[str, float] = {}
    for name, weight in data.items():
        if (new := function(name)) in changed:
            raise UserError(f"data names {new} twice: give it once, with the sum of the weights")
        changed[new] = weight
    return changed


def _absolute(data: str) -> str:
    return data if data == SHAPES_DATA else str(as_path(data))


RENAMED_SETTINGS = {
    "init_from": "checkpoint",
    "checkpointing": "remat",
    "micro_batches": "grad_accum_steps",
    "frozen": "frozen_params",
    "skipped_in_a_row": "max_nonfinite_steps",
    "validate_every": "eval_every",
    "validation_rows": "eval_examples",
    "answers": "eval_generations",
    "checkpoint_every": "checkpoints.every",
    "checkpoints_kept": "checkpoints.max_to_keep",
    "checkpoints_kept_every": "checkpoints.keep_period",
    "checkpoints_kept_best": "checkpoints.best_n",
    "chat.upstream": "chat.upstream_quirks",
    "loader.batch": "loader.batch_size",
    "loader.buckets": "loader.num_buckets",
    "loader.multiple": "loader.pad_to_multiple_of",
    "loader.workers": "loader.num_workers",
    "loader.threads": "loader.num_threads",
    "optimizer.decay": "optimizer.epoch_decay",
    "optimizer.final": "optimizer.final_lr_ratio",
    "optimizer.warmup": "optimizer.warmup_steps",
    "optimizer.clip": "optimizer.max_grad_norm",
}
"""Former names of settings, which are refused, and their present names."""


def check_setting_names(settings: Mapping[str, Any], folder: Path) -> None:
    """Check that the settings that a run stored have their present names.

    Args:
        settings: Settings of the run, nested.
        folder: Folder of the run, for the error.

    Raises:
        UserError: Settings have former names; the message gives the present ones.
    """
    if former := [old for old in RENAMED_SETTINGS if _contains(settings, old)]:
        changes = ", ".join(f"{old} is {RENAMED_SETTINGS[old]}" for old in former)
        raise UserError(f"the run in {folder} was begun by a version with other names of settings: {changes} now")


def _contains(settings: Any, name: str) -> bool:
    """Whether nested settings have a dotted name."""
    for key in name.split("."):
        if not isinstance(settings, Mapping) or key not in settings:
            return False
        settings = settings[key]
    return True
