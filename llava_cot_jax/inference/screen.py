"""Display of an answer while it is generated."""

import sys
from typing import Self

from rich.console import Console

from llava_cot_jax.stage_format import LLAVA_COT, StageFormat
from llava_cot_jax.stages import find_stages, may_be_staged, without_partial_mark


class Screen:
    """Shows an answer while it is generated: first the name of the current stage, then the conclusion.

    An answer without stages is shown whole.

    Args:
        show_reasoning: Whether to show the whole text of every answer.
        format: Format of the stages.
    """

    def __init__(self, show_reasoning: bool, format: StageFormat = LLAVA_COT) -> None:
        self._whole, self._format = show_reasoning, format
        self._shown = ""
        self._stage = ""
        self._console = Console(stderr=True)
        self._status = self._console.status("reading the question")

    def __enter__(self) -> Self:
        if not self._whole:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()  # restores the terminal's cursor, after Ctrl-C too

    def show(self, text: str) -> None:
        """Show the answer as far as it is generated."""
        stages = find_stages(text, self._format)
        if self._whole or not (stages or may_be_staged(text, self._format)):
            self._print(text)
        elif stages:
            stage, body = list(stages.items())[-1]
            if stage == self._format.conclusion:
                self._print(without_partial_mark(body, stage, self._format))
            elif stage != self._stage:
                self._stage = stage
                self._show_status(f"writing the {stage.lower()}")

    def finish(self, text: str) -> None:
        """Show what is still hidden of the whole answer, and end the line."""
        conclusion = find_stages(text, self._format).get(self._format.conclusion)
        self._print(text if self._whole or conclusion is None else conclusion)
        print(flush=True)

    def _show_status(self, what: str) -> None:
        self._status.update(what)
        if not self._console.is_terminal:
            print(what, file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        self._status.stop()
        print(text.removeprefix(self._shown), end="", flush=True)
        self._shown = text
