"""What a training run is: every field of its configuration file."""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from llava_cot_jax.data.settings import ChatSettings, LoaderSettings
from llava_cot_jax.data.sources import SHAPES
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.finding import absolute_name
from llava_cot_jax.model.choices import MESH_AXES, Dtype, RematPolicy
from llava_cot_jax.model.config import Convention
from llava_cot_jax.paths import as_path

Schedule = Literal["step", "cosine", "linear"]
Precision = Literal["float32", "bfloat16_stochastic", "bfloat16_nearest"]
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
        for axis in MESH_AXES:
            if (size := getattr(self, axis)) is not None and size < 1:
                raise UserError(f"mesh.{axis} is {size}; it must be at least 1")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); the defaults are LLaVA-CoT's own recipe.

    Attributes:
        learning_rate: at its highest.
        schedule: ``step`` multiplies it by ``decay`` after each epoch; ``cosine`` and ``linear`` bring
            it down to ``final`` of itself over all steps.
        decay: of ``step``.
        final: of ``cosine`` and ``linear``, a share.
        warmup: steps over which it rises from 0 first.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: a step, times the learning rate; of matrices alone, not of norms, gates and biases.
        clip: the global norm that gradients are scaled down to; 0 leaves them as they are.
        precision: of parameters and moments between steps. ``bfloat16_stochastic`` halves the memory
            and is right on average; ``bfloat16_nearest`` is what upstream trained with, for
            comparison: with it a second moment hardly decays (b2 = 0.999 is less than half a unit in
            the last place), and an update of 1e-5 is rounded away for most weights.

    Raises:
        UserError: a value that means nothing.
    """

    learning_rate: float = 1e-5
    schedule: Schedule = "step"
    decay: float = 0.85
    final: float = 0.0
    warmup: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name, known in (("schedule", get_args(Schedule)), ("precision", get_args(Precision))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(known)}")
        for name in ("learning_rate", "decay", "final", "warmup", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.eps <= 0:
            raise UserError(f"eps is {self.eps}; it must be above 0")

    @property
    def dtype(self) -> Dtype:
        """In which parameters and moments are kept."""
        return "float32" if self.precision == "float32" else "bfloat16"


@dataclass(frozen=True)
class LoraSettings:
    """Which weights get adapters, and how large.

    Attributes:
        rank: of every adapter; 0 is none: whole parameters are trained.
        alpha: over the rank, what adapters are multiplied by, so that another rank needs no other
            learning rate.
        targets: regular expressions; projections in whose names one is found get an adapter. By
            default all of the language model, which it takes to reach what training every weight
            reaches (Dettmers et al., arXiv 2305.14314).

    Raises:
        UserError: a value that means nothing.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["language_model.*_proj"])

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank is {self.rank}; it must not be negative (0 is no LoRA)")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha is {self.alpha}; it must be above 0")
        if not self.targets:
            raise UserError("lora.targets is empty: name the projections that are to get an adapter")

    @property
    def scale(self) -> float:
        """alpha / rank; 1 where there are no adapters."""
        return self.alpha / self.rank if self.rank else 1.0


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
        wandb: the Params & Biases project to log to as well.
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
    checkpointing: RematPolicy = "full"
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
        for name, kind in (("dtype", Compute), ("checkpointing", RematPolicy)):
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
