"""Model that a run starts from: a checkpoint, or the same architecture with random weights."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llava_cot_jax.files import copy_file, write_json
from llava_cot_jax.model.checkpoint.auxiliary_files import list_auxiliary_files
from llava_cot_jax.model.checkpoint.digest import WeightsDigest
from llava_cot_jax.model.checkpoint.folder import find_checkpoint, read_config, resolve_checkpoint
from llava_cot_jax.model.checkpoint.sharded_loading import load_params
from llava_cot_jax.model.convention import Convention
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.progress import OnProgress
from llava_cot_jax.training.base import Base


class InitialModel:
    """Model before its training.

    Attributes:
        config: Configuration of the model.
        processor: Tokenizer and image settings of the model.
        folder: Folder of the checkpoint.
        random_init: Whether the weights are random.
        has_weights: Whether ``folder`` holds the weights.

    Args:
        checkpoint: Checkpoint to start from, as in ``TrainSettings.checkpoint``.
        convention: Convention that the weights were trained with, if config.json does not state it.
        random_init: Whether to start from random weights.
        files: Folder with the files of the model other than its weights. By default, that of the checkpoint.

    Raises:
        UserError: There is no such checkpoint, or it cannot be read.
    """

    def __init__(
        self, checkpoint: str, convention: Convention | None, random_init: bool = False, files: Path | None = None
    ) -> None:
        self._checkpoint = checkpoint
        if files:
            self.folder = files
        else:
            self.folder = find_checkpoint(checkpoint, weights=False) if random_init else resolve_checkpoint(checkpoint)
        self._digest: WeightsDigest | None = None
        self.config = read_config(self.folder, convention)
        self.processor = Processor.from_pretrained(self.folder, self.config)
        self.random_init = random_init
        self.has_weights = not random_init and files is None

    def load_arrays(self, *, mesh: Mesh, dtype: Any, seed: int, on_progress: OnProgress) -> dict[str, jax.Array]:
        """Load the weights onto the mesh, by path in the stacked layout. Each process reads only its own shards.

        All processes must call this. Afterwards threads compute the digest of a checkpoint's weights, for which
        ``find_base`` waits.

        Args:
            mesh: Mesh over all devices.
            dtype: Dtype of random weights. Those of a checkpoint keep their own.
            seed: Seed of random weights.
            on_progress: Function that is called with the bytes that this process has read, and will read in all.

        Raises:
            UserError: The tensors do not match the configuration, or the mesh does not divide them.
        """
        if self.random_init:
            model = Mllama(self.config, rngs=nnx.Rngs(seed), layout="stacked", dtype=dtype, mesh=mesh)
            return flatten_dict(model.params, sep=".")
        folder = resolve_checkpoint(self._checkpoint)
        arrays = load_params(folder, self.config, layout="stacked", mesh=mesh, on_progress=on_progress)
        self._digest = WeightsDigest(folder, (jax.process_index(), jax.process_count()))
        return arrays

    def find_base(self) -> Base | None:
        """Return the identity of the weights that ``load_arrays`` has read, or None if it has read none.

        All processes must call this.

        Raises:
            UserError: A file of the weights cannot be read any more.
        """
        if self._digest is None:
            return None
        digest = self._digest.result(_sum_over_processes)
        return Base.at(self._checkpoint, resolve_checkpoint(self._checkpoint), digest)

    def close(self) -> None:
        """Leave unread what the digest of the weights has not come to."""
        if self._digest is not None:
            self._digest.close()

    def write_auxiliary_files(self, folder: Path) -> None:
        """Write all files of a checkpoint but the weights, unless they are read from ``folder``."""
        if folder == self.folder:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in list_auxiliary_files(self.folder):
            copy_file(path, folder / path.name)
        write_json(folder / "config.json", self.config.to_dict("float32"))


def _sum_over_processes(parts: np.ndarray) -> np.ndarray:
    """Return the sum of the arrays of all processes, uint32 as each of them."""
    if not len(parts):
        return parts
    gathered = np.asarray(multihost_utils.process_allgather(parts)).reshape(-1, len(parts))
    return gathered.sum(0, dtype=np.uint32)
