"""Model that a command answers questions with: the options that choose it, their checks, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.hosts.surroundings import device_fields
from llava_cot_jax.model.checkpoint.adapter_settings import read_adapter_settings
from llava_cot_jax.model.checkpoint.folder import read_config, read_max_new_tokens, resolve_checkpoint
from llava_cot_jax.model.choices import MESH_AXES, Dtype
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.paths import BUNDLED_MODEL
from llava_cot_jax.processing.probe import ProbePrompt

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llava_cot_jax.model.mllama import Mllama

DEFAULT_MODEL_NOTE = (
    "No --checkpoint was given: the small model of the package answers. It knows pictures of coloured "
    "shapes on a grid, such as it draws itself, and nothing else."
)


def add_model_options(parser: cli.Parser) -> None:
    """Add the options that choose a checkpoint, the form of its weights, and the mesh."""
    add = parser.add_argument
    add(
        "--checkpoint",
        type=str,
        help='Checkpoint to answer with: a folder in Hugging Face form, an id on the hub, or "shapes" (the default), '
        "the small model of the package.",
    )
    add("--dtype", choices=get_args(Dtype), help="Dtype of the weights. By default, the checkpoint's own.")
    add(
        "--quantize",
        choices=["int8"],
        help="Keep the text layers' weights in int8, which takes half the memory of bfloat16.",
    )
    for axis in MESH_AXES:
        add(
            f"--mesh.{axis}",
            type=int | None,
            default=None,
            help=f'Number of devices on the mesh axis "{axis}", by default 1; without any of these options, all '
            "devices are used.",
        )


@dataclass(frozen=True)
class AnsweringModel:
    """Model that a command answers with, before its weights are loaded.

    Attributes:
        options: Options of the command, among them those of ``add_model_options`` and ``add_weight_options``.
        folder: Folder of the checkpoint.
        config: Configuration of the model.
        stated_length: Largest number of tokens of an answer that the checkpoint states.
        is_default: Whether the user named no checkpoint, so that the small model of the package answers.
    """

    options: Any
    folder: Path
    config: MllamaConfig
    stated_length: int | None
    is_default: bool

    @classmethod
    def find(cls, options: Any) -> Self:
        """Find the checkpoint that the options name. Where they name none, ``options`` gets the package's own.

        Raises:
            UserError: There is no such checkpoint or adapter, or it cannot be used, or the verifier's was trained for
                another question.
        """
        if is_default := options.checkpoint is None:
            options.checkpoint = BUNDLED_MODEL
        if options.adapter is not None:
            read_adapter_settings(options.adapter)  # refuses before the weights are fetched
        if options.verifier_adapter is not None:
            digest = read_adapter_settings(options.verifier_adapter, for_verifier=True).probe_digest
            if digest and digest != ProbePrompt.load(options.judge_prompts).digest:
                raise UserError(
                    f"{options.verifier_adapter} was trained for another question to the verifier than that of "
                    f"{options.judge_prompts}: give as --judge_prompts the file that was verifier.judge_prompts in "
                    "training, which is the package's own by default"
                )
        folder = resolve_checkpoint(options.checkpoint)
        config = read_config(folder, options.convention)
        return cls(options, folder, config, read_max_new_tokens(folder), is_default)

    def mesh(self) -> Mesh | None:
        """Return the mesh that the options describe; None for a single device.

        Raises:
            UserError: It does not divide the model, or there are not as many devices.
        """
        from llava_cot_jax.model.sharding import check_mesh, default_mesh, make_mesh

        given = {axis: size for axis, size in vars(self.options.mesh).items() if size is not None}
        mesh = make_mesh(**given) if given else default_mesh(self.config)
        if mesh is not None:
            check_mesh(self.config, mesh)
        return mesh

    def load(self, mesh: Mesh | None, is_first: bool) -> Mllama:
        """Load the weights.

        Args:
            mesh: Mesh to put them on.
            is_first: Whether this is the process that shows how far this is.
        """
        from llava_cot_jax.model.mllama import Mllama

        if self.is_default and is_first:
            Console(stderr=True).print(DEFAULT_MODEL_NOTE, style="bold yellow")
        progress_bar = cli.progress_bar if is_first else cli.no_progress_bar
        with progress_bar("loading weights") as on_progress:
            model = Mllama.from_pretrained(
                self.folder,
                config=self.config,
                dtype=self.options.dtype,
                mesh=mesh,
                adapter=self.options.adapter,
                verifier_adapter=self.options.verifier_adapter,
                on_progress=on_progress,
            )
            if self.options.quantize:
                model.quantize()
        return model

    @cached_property
    def digests(self) -> dict[str, str | None]:
        """Digests by which the weights, and those of the adapters, are known again at the same paths."""
        from llava_cot_jax.model.checkpoint.fingerprint import adapter_digest, weights_digest

        adapter, verifier_adapter = self.options.adapter, self.options.verifier_adapter
        digests = {
            "weights": weights_digest(self.folder, self.config),
            "adapter_weights": None if adapter is None else adapter_digest(adapter),
        }
        if verifier_adapter is not None:
            digests["verifier_adapter_weights"] = adapter_digest(verifier_adapter, for_verifier=True)
        return digests

    def fields(self) -> dict[str, str]:
        """Return the files of the model and the devices of this process, by name."""
        from llava_cot_jax.model.checkpoint.fingerprint import checkpoint_fields

        digests = {f"the digest of the {name}": str(value) for name, value in self.digests.items()}
        return device_fields() | checkpoint_fields(self.folder, self.config, has_weights=False) | digests


def check_mesh_sizes(options: Any) -> None:
    """Check the sizes of the mesh, before anything slow is imported.

    Raises:
        UserError: One of them is less than one.
    """
    for axis, size in vars(options.mesh).items():
        if size is not None and size < 1:
            raise UserError(f"mesh.{axis} is {size}; it must be at least 1")
