"""What a training run is: every field of its configuration file."""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import jax
from jax.sharding import Mesh

from llava_cot_jax.data.chat import ChatSettings
from llava_cot_jax.data.loader import LoaderSettings
from llava_cot_jax.data.sources import SHAPES
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint import absolute_name
from llava_cot_jax.model.config import Convention
from llava_cot_jax.model.layers import Checkpointing
from llava_cot_jax.model.sharding import make_mesh
from llava_cot_jax.paths import as_path
from llava_cot_jax.training.lora import LoraSettings
from llava_cot_jax.training.optimizer import OptimizerSettings

Compute = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class MeshSettings:
    """The devices along each axis of the mesh.

    Attributes:
        data: how often the model is repeated.
        fsdp: pieces that parameters and batch are cut into; None is all devices that are left.
        tensor: pieces that heads, widths and the vocabulary are cut into.

    Raises:
        UserError: an axis below 1.
    """

    data: int = 1
    fsdp: int | None = None
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in ("data", "fsdp", "tensor"):
            if (size := getattr(self, axis)) is not None and size < 1:
                raise UserError(f"mesh.{axis} is {size}; it must be at least 1")

    def make(self) -> Mesh:
        """The mesh over all devices of all hosts.

        Raises:
            UserError: it takes more devices than there are, or leaves some out.
        """
        count = jax.device_count()
        rest = self.data * self.tensor
        fsdp = max(count // rest, 1) if self.fsdp is None else self.fsdp
        mesh = make_mesh(self.data, fsdp, self.tensor)
        if mesh.size != count:
            raise UserError(
                f"a mesh of data={self.data} x fsdp={fsdp} x tensor={self.tensor} leaves {count - mesh.size} of "
                f"{count} devices idle: change one of its axes"
            )
        return mesh


@dataclass(frozen=True)
class TrainSettings:
    """A training run.

    Attributes:
        output: the folder of the run, which takes the configuration, checkpoints, metrics, and the
            files that belong to the model; over several hosts one that all of them see, a bucket say.
        init_from: the checkpoint to start from: a folder in Hugging Face form, an id on the hub, a
            bucket path, or ``shapes``: the small trained model that comes with the package.
        random_init: start from random weights in place of those of ``init_from``, of which the configuration,
            the tokenizer and the image settings are used.
        data: a directory that ``llava_cot_jax.prepare`` made, or ``shapes``.
        convention: what the weights were trained with, where their config.json does not say so.
        epochs: how often each row is seen.
        steps: how many there are, whatever ``epochs`` says; None is all of those.
        seed: of fresh weights and adapters; the order of the data has its own, ``loader.seed``.
        dtype: of the computation.
        checkpointing: what of a layer the backward pass finds saved: everything (``none``), its
            matrix products (``dots``), or its input alone (``full``).
        micro_batches: parts that each device computes its rows of a batch in, one after the other.
        frozen: regular expressions; parameters in whose names one is found are not trained. Names are
            those of stacked layers: ``layers.3`` stands for layers 3, 8, 13 and so on of the 11B.
        checkpoint_every: steps between checkpoints; the last step is always kept.
        checkpoints_kept: so many of the newest.
        checkpoints_kept_every: those of steps that are multiples of it, too; 0 is none.
        checkpoints_kept_best: so many of the lowest validation loss, too, of the steps that are validated.
        skipped_in_a_row: so many steps in a row whose loss or gradient is not finite end the run.
        validate_every: steps between validations; 0 is none but the one at the end.
        validation_rows: of the validation split, the first so many; 0 leaves validation out.
        log_every: steps between the lines that are printed where no progress bar can be.
        answers: questions of the validation split that are answered at the end, to count how many
            captions and conclusions are the row's own; 0 leaves this out.
        profile: a trace of a few steps is written to the folder of the run.
        wandb: the Weights & Biases project to log to as well.
        mesh: see there.
        chat: how turns become tokens.
        loader: how rows become batches.
        optimizer: see there.
        lora: see there; with a rank, adapters alone are trained.

    Raises:
        UserError: a value that means nothing, or two that contradict each other.
    """

    output: str
    init_from: str
    data: str
    random_init: bool = False
    convention: Convention | None = None
    epochs: int = 3
    steps: int | None = None
    seed: int = 0
    dtype: Compute = "bfloat16"
    checkpointing: Checkpointing = "full"
    micro_batches: int = 1
    frozen: list[str] = field(default_factory=list)
    checkpoint_every: int = 1000
    checkpoints_kept: int = 2
    checkpoints_kept_every: int = 0
    checkpoints_kept_best: int = 0
    skipped_in_a_row: int = 5
    validate_every: int = 1000
    validation_rows: int = 1000
    log_every: int = 10
    answers: int = 0
    profile: bool = False
    wandb: str | None = None
    mesh: MeshSettings = field(default_factory=MeshSettings)
    chat: ChatSettings = field(default_factory=ChatSettings)
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        counts = ("epochs", "micro_batches", "checkpoint_every", "checkpoints_kept", "skipped_in_a_row", "log_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        kept = ("checkpoints_kept_every", "checkpoints_kept_best")
        for name in ("seed", *kept, "validate_every", "validation_rows", "answers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps is {self.steps}; it must be at least 1, or left out")
        for name, kind in (("dtype", Compute), ("checkpointing", Checkpointing)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(get_args(kind))}")
        if self.checkpoints_kept_best and not self.validation_rows:
            raise UserError("checkpoints_kept_best is set, but validation_rows is 0: nothing tells which are best")
        if self.loader.batch % self.micro_batches:
            raise UserError(f"micro_batches is {self.micro_batches}; it must divide loader.batch, {self.loader.batch}")
        if self.lora.rank and self.frozen:
            raise UserError("frozen is set, and lora.rank: with adapters, all else is frozen; leave one of them out")

    def with_absolute_paths(self) -> "TrainSettings":
        """The same settings, with paths that mean the same from any working directory.

        Raises:
            UserError: a path that ``as_path`` refuses.
        """
        data = self.data if self.data == SHAPES else str(as_path(self.data))
        return replace(self, output=str(as_path(self.output)), data=data, init_from=absolute_name(self.init_from))
