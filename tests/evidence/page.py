"""Measure how long a browser takes to open the page of an evaluation, and to filter its questions.

    python tests/evidence/page.py | tee tests/evidence/page.txt

Each question has a photo of its own, of 1280 x 960 pixels of smoothed noise, and a search by four stages of four
candidates with token verdicts in both orders. Stages have 40, 90, 130 and 12 words. "Opened" is the time from the
request until all of the page was read and two frames were drawn after that; "seen" is the first frame. The best, the
median and the worst of so many turns are told, each in a new window of the system's Chromium without a window. Filters
are timed until the next frame; the first text that is sought has the page read what is folded.
"""

import argparse
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_cot_jax.search.page import PageEntry, write_page  # noqa: E402
from llava_cot_jax.search.trace import StageTrace, Trace  # noqa: E402
from llava_cot_jax.stage_format import STAGES  # noqa: E402
from tests.browser import DESKTOP, open_browser  # noqa: E402
from tests.search import traces  # noqa: E402

WORDS = (40, 90, 130, 12)
"""Number of words of a candidate of each stage."""

VOCABULARY = [
    f"{start}{middle}{end}" for start in "bdklmst" for middle in ("a", "ea", "ou") for end in ("r", "n", "ck")
]

TWO_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, nargs="+", default=[500, 1500], help="Numbers of questions.")
    parser.add_argument("--turns", type=int, default=7, help="Number of times that each page is opened.")
    options = parser.parse_args()
    with open_browser() as browser, tempfile.TemporaryDirectory() as folder:
        names = f"playwright {version('playwright')}; Chromium {browser.version}; {os.cpu_count()} cores"
        print(f"{datetime.date.today()}; {names}")
        for count in options.questions:
            path, start = Path(folder) / "page.html", time.perf_counter()
            write_page(path, list(entries(count)), {"search": "StageBeam(num_candidates=4)"})
            took = time.perf_counter() - start
            print(f"\n{count} questions: {path.stat().st_size / 1e6:.1f} MB, written in {took:.1f} s")
            turns = [open_once(browser, path) for _ in range(options.turns)]
            for name in turns[0]:
                seconds = sorted(turn[name] for turn in turns)
                middle = statistics.median(seconds)
                print(f"  {name:34s} best {seconds[0]:.2f} s, median {middle:.2f} s, worst {seconds[-1]:.2f} s")


def entries(count: int) -> Iterator[PageEntry]:
    """Yield questions with their searches."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
        photo = small.resize((1280, 960), Image.Resampling.BICUBIC)
        category = ("count", "compare", "look up", "relate")[i % 4]
        yield PageEntry(searched(i, rng), [photo], "two", correct=bool(i % 3), category=category, name=f"test-{i}")


def searched(number: int, rng: np.random.Generator) -> Trace:
    """Return a search by stages, with random words."""
    stages = []
    for stage, count in zip(STAGES, WORDS, strict=True):
        matches, winner = traces.knockout(4)
        texts = [" ".join(rng.choice(VOCABULARY, count)) for _ in range(4)]
        candidates = [traces.candidate(f" {text} </{stage}>", -0.1 * i) for i, text in enumerate(texts)]
        stages.append(StageTrace(stage, candidates, [], matches, winner))
    question = f"Question {number}: {' '.join(rng.choice(VOCABULARY, 12))}?"
    return replace(traces.make_trace(stages, question=question), seed=number)


def open_once(browser: Browser, path: Path) -> dict[str, float]:
    """Return the seconds of each step by name."""
    page = browser.new_page(viewport=DESKTOP)
    seconds = {}
    start = time.perf_counter()
    page.goto(path.as_uri())
    page.evaluate(TWO_FRAMES)
    seconds["opened"] = time.perf_counter() - start
    seconds["seen"] = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000

    def timed(name: str, step: str) -> None:
        start = time.perf_counter()
        page.evaluate(step)
        page.evaluate(TWO_FRAMES)
        seconds[name] = time.perf_counter() - start

    timed("wrong ones alone", "document.querySelector('[value=\"=wrong\"]').click()")
    seek = "text => { const field = document.querySelector('[type=search]'); field.value = text; "
    seek += "field.dispatchEvent(new Event('input', { bubbles: true })); }"
    timed("first text that is sought", f"({seek})('bar dan')")
    timed("second text that is sought", f"({seek})('bar dan k')")
    timed("a question opened", "document.querySelector('details.entry:not([hidden]) > summary').click()")
    page.close()
    return seconds


if __name__ == "__main__":
    main()
