"""What a person sees of an answer while it comes."""

import sys
from typing import Self

from rich.console import Console

from llava_cot_jax.stages import find_stages, may_be_staged


class Screen:
    """Shows a person an answer as it grows: the stage being worked on, then the conclusion.

    With ``show_reasoning``, and where the answer has no stages, the whole text.
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
        self._status.stop()  # gives the terminal its cursor back, after Ctrl-C too

    def show(self, text: str) -> None:
        """The answer so far."""
        stages = find_stages(text)
        if self._whole or not (stages or may_be_staged(text)):
            self._print(text)
        elif stages:
            stage, body = list(stages.items())[-1]
            if stage == "CONCLUSION":
                self._print(_without_partial_tag(body))
            elif stage != self._stage:
                self._stage = stage
                self._tell(f"writing the {stage.lower()}")

    def finish(self, text: str) -> None:
        """The whole answer: what of it was held back is shown."""
        conclusion = find_stages(text).get("CONCLUSION")
        self._print(text if self._whole or conclusion is None else conclusion)
        print(flush=True)

    def _tell(self, what: str) -> None:
        self._status.update(what)
        if not self._console.is_terminal:
            print(what, file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        self._status.stop()
        print(text.removeprefix(self._shown), end="", flush=True)
        self._shown = text


def _without_partial_tag(body: str) -> str:
    """``body`` without the beginning of a closing tag at its end."""
    start = body.rfind("<")
    return body[:start].rstrip() if start >= 0 and "</CONCLUSION>".startswith(body[start:]) else body
