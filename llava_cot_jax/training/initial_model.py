"""What a run starts from: a published checkpoint, or the same model with random weights."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from llava_cot_jax.files import copy_file, write_json
from llava_cot_jax.model.checkpoint.auxiliary_files import list_auxiliary_files
from llava_cot_jax.model.checkpoint.folder import find_checkpoint, read_config, resolve_checkpoint
from llava_cot_jax.model.checkpoint.sharded_loading import load_params
from llava_cot_jax.model.config import Convention
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.progress import OnProgress


class Origin:
    """A model before its training.

    Attributes:
        config: the model's configuration.
        processor: its tokenizer and image settings.
        folder: of the checkpoint.
        random_init: whether its weights are random ones.

    Args:
        checkpoint: as ``TrainSettings`` explains.
        convention: likewise.
        random_init: likewise.

    Raises:
        UserError: no such checkpoint, or one that cannot be read.
    """

    def __init__(self, checkpoint: str, convention: Convention | None, random_init: bool = False) -> None:
        self.folder = find_checkpoint(checkpoint, weights=False) if random_init else resolve_checkpoint(checkpoint)
        self.config = read_config(self.folder, convention)
        self.processor = Processor.from_pretrained(self.folder, self.config)
        self.random_init = random_init

    def arrays(self, *, mesh: Mesh, dtype: Any, seed: int, on_progress: OnProgress) -> dict[str, jax.Array]:
        """The weights by path, stacked, on the mesh; each process reads the bytes of its own shards.

        Args:
            mesh: over all devices.
            dtype: of random weights; those of a checkpoint keep its own.
            seed: of random weights.
            on_progress: called with the bytes that this process has read and is to read.

        Raises:
            UserError: tensors that are not those of the configuration, or a mesh that does not divide them.
        """
        if self.random_init:
            model = Mllama(self.config, rngs=nnx.Rngs(seed), layout="stacked", dtype=dtype, mesh=mesh)
            return flatten_dict(model.params, sep=".")
        return load_params(self.folder, self.config, layout="stacked", mesh=mesh, on_progress=on_progress)

    def write_auxiliary_files(self, folder: Path) -> None:
        """Write all but the weights: with these and the weights, a checkpoint is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in list_auxiliary_files(self.folder):
            copy_file(path, folder / path.name)
        write_json(folder / "config.json", self.config.to_dict("float32"))
