"""Rows and a processor for the tests of the data."""

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from llava_cot_jax.data.rows import Row, Turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.processing.tokenizer import make_tokenizer
from tests.demo import CORPUS, VOCAB_SIZE, demo_config


@cache
def demo_processor() -> Processor:
    """Processor of the demo model, with at most four tiles of 56 x 56 pixels."""
    tokenizer = make_tokenizer(CORPUS, VOCAB_SIZE)
    return Processor(demo_config(tokenizer), tokenizer)


def staged(summary: str, caption: str, reasoning: str, conclusion: str) -> str:
    return (
        f"<SUMMARY> {summary} </SUMMARY>\n\n<CAPTION> {caption} </CAPTION>\n\n"
        f"<REASONING> {reasoning} </REASONING>\n\n<CONCLUSION> {conclusion} </CONCLUSION>"
    )


@dataclass
class Noise:
    """Rows with noise pictures of many sizes, whose answers have the lengths ``words`` in turn."""

    count: int
    words: tuple[int, ...] = (3, 40, 8, 70, 15, 5, 100, 22)
    fingerprint: str = "noise"

    def __len__(self) -> int:
        return self.count

    def turns(self, index: int) -> tuple[Turn, ...]:
        answer = " ".join(["red"] * self.words[index % len(self.words)])
        return (Turn(f"How many in picture {index}?", staged("count", "shapes", answer, str(index)), images=1),)

    def __getitem__(self, index: int) -> Row:
        draw = np.random.default_rng(index)
        height, width = draw.integers(20, 200, 2)
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
        return Row(f"noise-{index}", "noise", (file.getvalue(),), self.turns(index))
