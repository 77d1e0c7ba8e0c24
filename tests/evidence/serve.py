"""Questions a second of a server with 1, 8 and 64 clients, against a stream of the same questions in one process.

    python tests/evidence/serve.py | tee tests/evidence/serve.txt

The small model of the package answers by a stage-level beam search of four candidates, in eight slots. A client sends
its next question once it has an answer, and the stream that one client is held to has one question at a time too. The
stream and the server take turns. Beside the time that has passed, which other work on the machine lengthens, is the
time that the cores have worked for the process that answers. The clients run on the cores of the server.
"""

import argparse
import base64
import datetime
import http.client
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from llava_cot_jax.cli import enable_compilation_cache
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.search.stream import Question

ROOT = Path(__file__).parents[2]

CLIENTS = {1: 8, 8: 24, 64: 64}
"""Numbers of questions, by the number of clients."""

SLOTS, TOKENS = 8, 48
SEARCH = StageBeam(4, max_new_tokens=TOKENS)
ROOM: dict[str, Any] = {"prompt_tokens": 128, "images": 1}
OPTIONS = ["--search", "stage_beam", "--max_new_tokens", str(TOKENS), "--slots", str(SLOTS), "--prompt_tokens", "128"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    enable_compilation_cache()
    device = jax.devices()[0].device_kind
    load = f"{os.cpu_count()} cores with a load of {os.getloadavg()[0]:.1f} before"
    print(f"{datetime.date.today()}; jax {jax.__version__}; {device}; {load}", flush=True)
    processor = Processor.from_pretrained("shapes")
    reasoner = Reasoner(Mllama.from_pretrained("shapes"), processor, SEARCH)
    asked = questions(max(CLIENTS.values()))
    with serving() as (port, process):

        def stream(count: int, clients: int) -> list[str]:
            parts = [[each] for each in asked[:count]] if clients == 1 else [asked[:count]]
            streams = (reasoner.answer_stream(part, slots=SLOTS, **ROOM) for part in parts)
            return [each.answer.text for part in streams for each in part if each.answer]

        stream(2, 8)  # compiles
        for clients, count in CLIENTS.items():
            here = timed(os.getpid(), lambda: stream(count, clients))  # noqa: B023
            there = timed(process, lambda: ask(port, asked[:count], clients))  # noqa: B023
            equal = sum(a == b for a, b in zip(here.texts, there.texts, strict=True))
            rates = f"stream {count / here.seconds:.2f} a second, server {count / there.seconds:.2f}"
            work = f"stream {here.worked / count:.2f}, server {there.worked / count:.2f}"
            print(
                f"{clients:2} clients, {count} questions: {rates}, {here.seconds / there.seconds:.2f} times as many; "
                f"core seconds a question: {work}, {here.worked / there.worked:.2f} times as many questions a core "
                f"second; same texts: {equal} of {count}",
                flush=True,
            )


@dataclass(frozen=True)
class Timed:
    """Answers, the seconds that passed, and those that the cores worked for the process that answered."""

    texts: list[str]
    seconds: float
    worked: float


def timed(process: int, answer: Callable[[], list[str]]) -> Timed:
    """Call a function whose answers a process makes."""
    start, worked = time.perf_counter(), worked_seconds(process)
    texts = answer()
    return Timed(texts, time.perf_counter() - start, worked_seconds(process) - worked)


def worked_seconds(process: int) -> float:
    """Return the seconds that the cores have worked for a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def questions(count: int) -> list[Question]:
    """Return questions of the shapes world's test split, with seeds of their own."""
    rows = ShapesRows("test", seed=0, size=count)
    return [Question(rows[i].turns[0].question, rows[i].images[0], seed=i) for i in range(count)]


@contextmanager
def serving() -> Iterator[tuple[int, int]]:
    """Start a server, and give its port and process once it is ready."""
    command = [sys.executable, "-m", "llava_cot_jax.serve", "--checkpoint", "shapes", "--port", "0", *OPTIONS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr
        lines = (re.match(r"serving .*:(\d+)/v1", line) for line in process.stderr)
        yield next(int(found[1]) for found in lines if found), process.pid
        process.terminate()
        process.stderr.read()


def ask(port: int, asked: list[Question], clients: int) -> list[str]:
    """Return the texts of the answers of a server, which so many clients ask at a time."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda question: answer_of(port, question), asked))


def answer_of(port: int, question: Question) -> str:
    """Return the text of an answer."""
    file = io.BytesIO()
    assert isinstance(question.images, Image.Image)
    question.images.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.question}]
    body = {"model": "shapes", "messages": [{"role": "user", "content": parts}], "seed": question.seed}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    answer = json.load(connection.getresponse())
    connection.close()
    text: str = answer["choices"][0]["llava_cot"]["text"]
    return text


if __name__ == "__main__":
    main()
