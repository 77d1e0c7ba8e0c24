"""Answer streams of questions: decoding steps against batches, equality with each question alone, and memory.

    python tests/evidence/answer_stream.py | tee tests/evidence/answer_stream.txt

The model is the random one of the tests of the search: three text layers, a vocabulary of 512, of which one token in
thirty ends a stage. So the length of a candidate is drawn from about a geometric distribution, cut at 120 tokens.
"""

import argparse
import datetime
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.scorers import Judge
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.search.stream import Question

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.search.models import random_model  # noqa: E402

COUNT, SLOTS, MANY = 64, 8, 1000
STAGES = StageBeam(4, Judge("token"), temperature=1.0, max_new_tokens=120, top_k=None, top_p=1.0)
SHORT = StageBeam(2, Judge("token"), temperature=1.0, max_new_tokens=12)
ROOM = {"slots": SLOTS, "prompt_tokens": 128, "images": 1}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{datetime.date.today()}; jax {jax.__version__}; {jax.devices()[0].device_kind}; {SLOTS} slots")
    model, processor = random_model(1, eos=tuple(range(0, 500, 30)))
    reasoner = Reasoner(model, processor, STAGES)
    asked = list(questions(COUNT))
    list(reasoner.answer_stream(asked[:2], **ROOM))  # compiles
    counter = CompilationCounter()
    stream, start = reasoner.answer_stream(asked, **ROOM), time.perf_counter()
    answers = [streamed.answer for streamed in stream]
    seconds = time.perf_counter() - start
    print(f"\n{COUNT} questions, four stages of four candidates, token verdicts; programs compiled: {counter.count}")
    steps = np.array([decoding_steps(answer) for answer in answers])  # [questions, stages]
    quartiles = np.percentile(steps + 1, [0, 25, 50, 75, 100]).astype(int).tolist()
    print(f"tokens of a stage's longest candidate, smallest, quartiles and largest: {quartiles}")
    batches = sum(int(steps[i : i + SLOTS].max(axis=0).sum()) for i in range(0, COUNT, SLOTS))
    print(f"decoding steps: stream {stream.decoding_steps}, batches of {SLOTS} {batches}", end="")
    print(f", {batches / stream.decoding_steps:.2f} times as many; one by one {steps.sum()}")
    answer_batches(reasoner, asked[:SLOTS])  # compiles
    start = time.perf_counter()
    batched = answer_batches(reasoner, asked)
    in_batches = time.perf_counter() - start
    print(f"seconds: stream {seconds:.1f}, batches {in_batches:.1f}, {in_batches / seconds:.2f} times as long")
    alone = [next(reasoner.answer_stream([question], **ROOM)).answer for question in asked]
    equal = sum(plain(one) == plain(other) for one, other in zip(answers, alone, strict=True))
    print(f"equal to the question alone in slots of the same shape, bit for bit: {equal} of {COUNT}")
    equal = sum(one.text == other.text for one, other in zip(answers, batched, strict=True))
    print(f"same text as in a batch, which is another program: {equal} of {COUNT}")

    print(f"\n{MANY} questions, four stages of two candidates of 12 tokens: memory after so many answers")
    reasoner = Reasoner(model, processor, SHORT)
    counter = CompilationCounter()
    for streamed in reasoner.answer_stream(questions(MANY), **ROOM):
        done = streamed.index + 1
        if done in (20, 100) or done % 200 == 0:
            gc.collect()
            live = sum(x.nbytes for x in jax.live_arrays())
            print(f"{done:5}: {resident():7.1f} MB resident, {live / 1e6:.3f} MB in arrays, {counter.count} compiled")


def questions(count: int) -> Iterator[Question]:
    """Yield questions about pictures of noise, whose seeds are their numbers."""
    for i in range(count):
        rng = np.random.default_rng(i)
        picture = rng.integers(0, 256, (48, 48, 3), np.uint8)
        yield Question(f"What is this{' or that' * (i % 7)}?", picture, seed=i)


def answer_batches(reasoner: Reasoner, asked: list[Question]) -> list[Answer]:
    """Return the answers of one batch after the other, each of as many questions as there are slots."""
    answers = []
    for i in range(0, len(asked), SLOTS):
        batch = asked[i : i + SLOTS]
        images, texts, seeds = zip(*((q.images, q.question, q.seed) for q in batch), strict=True)
        answers += reasoner.answer_batch(images, texts, seeds=seeds)
    return answers


def decoding_steps(answer: Answer | None) -> list[int]:
    """Return the decoding steps that each stage of an answer takes alone; the first token takes none."""
    assert answer is not None
    return [max(c.tokens + (c.ended == "eos") for c in stage.candidates) - 1 for stage in answer.trace.stages]


def plain(answer: Answer | None) -> dict:
    """Return all of an answer but the times."""
    assert answer is not None
    return vars(answer) | {"trace": vars(answer.trace) | {"seconds": None}}


def resident() -> float:
    """Return the resident memory of this process in MB."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
