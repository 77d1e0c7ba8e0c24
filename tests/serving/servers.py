"""Servers that tests start, and the requests that evaluation tools send them."""

import base64
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

KEY = "the key of the tests"


@dataclass
class Served:
    """Server that runs.

    Attributes:
        process: Its process.
        url: Base URL of its API.
        before: What /health said before the model was loaded, and what a question was answered with.
    """

    process: subprocess.Popen[str]
    url: str

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def wait_for(self, word: str) -> str:
        """Return the URL in the next line on standard error that begins with a word."""
        assert self.process.stderr
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if line.startswith(word):
                return next(part for part in line.replace(",", " ").split() if part.startswith("http"))
        raise AssertionError("".join(lines))

    def stop(self) -> int:
        """Ask the server to stop, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Served]:
    """Start a server of the small model at a free port. It is listening, but perhaps not ready."""
    command = [sys.executable, "-m", "llava_cot_jax.serve", "--checkpoint", "shapes", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    served = Served(process, "")
    try:
        served.url = served.wait_for("listening at")
        yield served
    finally:
        process.kill()
        process.wait()


def data_url(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """Return an image as a ``data:`` URL."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def user(text: str, *urls: str, **detail: str) -> dict[str, Any]:
    """Return the message of a user with images before its text, as evaluation tools send it."""
    images = [{"type": "image_url", "image_url": {"url": url, **detail}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}
