"""Weights that a run started from, and how they are known again: adapters and frozen parts are nothing without them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llava_cot_jax.errors import UserError


@dataclass(frozen=True)
class Base:
    """Checkpoint that a run started from.

    Attributes:
        checkpoint: Name of the checkpoint, as the run's settings have it.
        commit: Commit of the checkpoint on the Hugging Face hub, or None if it was not fetched from there.
        digest: Digest of its weights, ``WeightsDigest``.
    """

    checkpoint: str
    commit: str | None
    digest: str

    @classmethod
    def at(cls, checkpoint: str, folder: Path, digest: str) -> Self:
        """Return the base that lies in ``folder``, where a file cache of the hub tells its commit."""
        fetched = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
        return cls(checkpoint, folder.name if fetched else None, digest)

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Self | None:
        """Return the base that the description of a run names, if it names one."""
        stored = description.get("base")
        return cls(**stored) if stored else None

    def __str__(self) -> str:
        commit = f", commit {self.commit}" if self.commit else ""
        return f"{self.checkpoint} (weights {self.digest}{commit})"


def check_same_base(before: Base | None, now: Base, remedy: str) -> None:
    """Check that weights are those that a run started from.

    Args:
        before: Base of the run; None if a version wrote it that did not store one.
        now: Base that is found now.
        remedy: What the user can do, for the error.

    Raises:
        UserError: They are others.
    """
    if before and before.digest != now.digest:
        on_hub = before.commit and not Path(before.checkpoint).is_absolute()
        fetch = f" (`hf download {before.checkpoint} --revision {before.commit}` fetches it)" if on_hub else ""
        raise UserError(
            f"the run started from {before}, and its adapters or frozen parameters fit no other weights, but now there "
            f"is {now}: {remedy}{fetch}"
        )
