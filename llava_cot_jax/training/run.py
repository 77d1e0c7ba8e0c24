"""A run's settings, model, mesh and output, which travel together through training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jax.sharding import Mesh

from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.model.sharding import check_mesh
from llava_cot_jax.paths import as_path
from llava_cot_jax.progress import ProgressBar
from llava_cot_jax.training.initial_model import InitialModel
from llava_cot_jax.training.layout import CHECKPOINTS, kept_model_files
from llava_cot_jax.training.program import check_batch_size, choose_trained, make_run_mesh
from llava_cot_jax.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Run:
    """Training run before its first step.

    Attributes:
        settings: Settings of the run, with absolute paths.
        initial_model: Model that the run starts from.
        mesh: Mesh over all devices of all hosts.
        log: Function that shows a line, or a table of rich, to the user.
        progress_bar: Function that opens a progress bar, such as ``cli.progress_bar``.
    """

    settings: TrainSettings
    initial_model: InitialModel
    mesh: Mesh
    log: Callable[[Any], None]
    progress_bar: ProgressBar

    @classmethod
    def open(cls, settings: TrainSettings, log: Callable[[Any], None], progress_bar: ProgressBar) -> Self:
        """Make the mesh and read the initial model's configuration and tokenizer.

        Raises:
            UserError: A setting, or a file that it names, cannot be used.
        """
        settings = settings.with_absolute_paths()
        mesh = make_run_mesh(settings.mesh)
        files = kept_model_files(settings)
        initial_model = InitialModel(settings.checkpoint, settings.convention, settings.random_init, files)
        check_batch_size(settings, mesh)
        check_mesh(initial_model.config, mesh)
        choose_trained(settings, parameters(initial_model.config, "stacked"))  # a pattern may match nothing
        return cls(settings=settings, initial_model=initial_model, mesh=mesh, log=log, progress_bar=progress_bar)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return as_path(self.settings.output)

    @property
    def checkpoints_folder(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / CHECKPOINTS
