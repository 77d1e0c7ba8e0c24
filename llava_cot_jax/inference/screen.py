"""Display of an answer while it is generated."""

import sys
from typing import Self

from rich.console import Console

from llava_cot_jax.stages import find_stages, may_be_staged


class Screen:
    """Shows an answer while it is generated: first the name of the current stage, then the conclusion.

    An answer without stages is shown whole.

    Args:
        show_reasoning: Whether to show the whole text of every answer.
    """

    def __init__(self, show_reasoning: bool) -> None:
        self._whole = show_reasoning
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
        stages = find_stages(text)
        if self._whole or not (stages or may_be_staged(text)):
            self._print(text)
        elif stages:
            stage, body = list(stages.items())[-1]
            if stage == "CONCLUSION":
                self._print(_without_partial_tag(body))
            elif stage != self._stage:
                self._stage = stage
                self._show_status(f"writing the {stage.lower()}")

    def finish(self, text: str) -> None:
        """Show what is still hidden of the whole answer, and end the line."""
        conclusion = find_stages(text).get("CONCLUSION")
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


def _without_partial_tag(body: str) -> str:
    """Return ``body`` without the beginning of a closing tag at its end."""
    start = body.rfind("<")
    return body[:start].rstrip() if start >= 0 and "</CONCLUSION>".startswith(body[start:]) else body
