"""Questions a second of a server with 1, 8 and 64 clients, against a stream of the same questions in one process.

    python tests/evidence/serve.py | tee tests/evidence/serve.txt

The small model of the package answers by a stage-level beam search of four candidates, in eight slots. A client sends
its next question once it has an answer. The stream and the server take turns, and the median of the rounds counts. The
stream that one client is held to has one question at a time too. The clients run on the cores of the server.
"""

import argparse
import base64
import datetime
import http.client
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from llava_cot_jax.cli import enable_compilation_cache
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.growing_slots import GrowingSlots
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.search.stream import Question

ROOT = Path(__file__).parents[2]

CLIENTS = {1: 12, 8: 48, 64: 64}
"""Numbers of questions, by the number of clients."""

SLOTS, TOKENS = 8, 48
SEARCH = StageBeam(4, max_new_tokens=TOKENS)
ROOM: dict[str, Any] = {"prompt_tokens": 128, "images": 1}
OPTIONS = ["--search", "stage_beam", "--max_new_tokens", str(TOKENS), "--slots", str(SLOTS), "--prompt_tokens", "128"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds")
    rounds = parser.parse_args().rounds
    enable_compilation_cache()
    device = jax.devices()[0].device_kind
    load = f"{os.cpu_count()} cores with a load of {os.getloadavg()[0]:.1f} before"
    print(f"{datetime.date.today()}; jax {jax.__version__}; {device}; {load}", flush=True)
    model, processor = Mllama.from_pretrained("shapes"), Processor.from_pretrained("shapes")
    reasoner = Reasoner(model, processor, SEARCH)
    asked = questions(max(CLIENTS.values()))
    with serving() as port:
        alone = GrowingSlots(model, RequestBuilder(processor, SEARCH), SLOTS, **ROOM)
        for clients, count in CLIENTS.items():
            here: list[float] = []
            there: list[float] = []
            for round_ in range(rounds + 1):
                start = time.perf_counter()
                if clients == 1:
                    texts = list(one_by_one(alone, RequestBuilder(processor, SEARCH), asked[:count]))
                else:
                    stream = reasoner.answer_stream(asked[:count], slots=SLOTS, **ROOM)
                    texts = [each.answer.text for each in stream if each.answer]
                between = time.perf_counter()
                answers = ask(port, asked[:count], clients)
                if round_:  # the first compiles
                    here.append(count / (between - start))
                    there.append(count / (time.perf_counter() - between))
            equal = sum(a == b for a, b in zip(texts, answers, strict=True))
            shares = ", ".join(f"{b / a:.2f}" for a, b in zip(here, there, strict=True))
            print(f"{clients:2} clients, {count} questions: stream {statistics.median(here):.2f} a second, server "
                  f"{statistics.median(there):.2f}; server / stream by round: {shares}; same texts: {equal} of {count}",
                  flush=True)  # fmt: skip


def questions(count: int) -> list[Question]:
    """Return questions of the shapes world's test split, with seeds of their own."""
    rows = ShapesRows("test", seed=0, size=count)
    return [Question(rows[i].turns[0].question, rows[i].images[0], seed=i) for i in range(count)]


def one_by_one(slots: GrowingSlots, builder: RequestBuilder, asked: list[Question]) -> Iterator[str]:
    """Yield the answers of questions of which each begins when the one before has its answer."""
    for i, question in enumerate(asked):
        slots.admit(i, builder.build([question.images], [question.question], question.seed))
        while slots.num_occupied:
            for _, found in slots.finish_decoding(slots.begin_decoding()):
                yield found.text


@contextmanager
def serving() -> Iterator[int]:
    """Start a server, and give its port once it is ready."""
    command = [sys.executable, "-m", "llava_cot_jax.serve", "--checkpoint", "shapes", "--port", "0", *OPTIONS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr
        lines = (re.match(r"serving .*:(\d+)/v1", line) for line in process.stderr)
        yield next(int(found[1]) for found in lines if found)
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
