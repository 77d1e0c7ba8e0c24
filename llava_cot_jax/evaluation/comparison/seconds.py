"""Seconds that questions take, without those of compilations, added up over the interruptions of a run."""

import time
from pathlib import Path

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json, write_json
from llava_cot_jax.paths import writing_errors

SECONDS = "seconds.json"
"""File in the folder of a run."""

_COMPILATION = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
"""Events of jax that tell how long a part of a compilation took, at its end."""


class Seconds:
    """Seconds that the questions of a run took, which stay whatever happens afterwards.

    Args:
        folder: Folder of the run.

    Raises:
        UserError: The file in it is none of this kind.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SECONDS
        self._questions, self._seconds = 0, 0.0
        if self._path.exists():
            content = read_json(self._path)
            try:
                self._questions, self._seconds = int(content["questions"]), float(content["seconds"])
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{self._path} does not say how many seconds questions took: delete it") from None

    def add(self, seconds: float) -> None:
        """Add the seconds of one question.

        Raises:
            UserError: They cannot be written.
        """
        self._questions += 1
        self._seconds += seconds
        with writing_errors(self._path):
            write_json(self._path, {"questions": self._questions, "seconds": self._seconds})

    @property
    def per_question(self) -> float | None:
        """Mean over the questions whose seconds are known; None where there are none."""
        return self._seconds / self._questions if self._questions else None


class CompilationTimer:
    """Adds up how long jax traces and compiles programs after the timer is made.

    Attributes:
        seconds: Seconds so far. A time inside another one counts once.
    """

    def __init__(self) -> None:
        import jax

        self.seconds = 0.0
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event not in _COMPILATION:
            return
        start = time.perf_counter() - duration_secs
        while self._spans and self._spans[-1][0] >= start:  # a program that is traced while another one is
            self.seconds -= self._spans.pop()[1]
        self._spans.append((start, duration_secs))
        self.seconds += duration_secs
