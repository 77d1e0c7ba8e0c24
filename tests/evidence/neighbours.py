"""Count the candidates that are the same whether their question is answered alone or beside others.

    python tests/evidence/neighbours.py | tee tests/evidence/neighbours.txt

Three questions, with no image, one and three, are answered side by side, and each alone. Candidates are whole answers
of up to 24 tokens, sampled at temperature 1 with top_k 50 and top_p 0.9. One counts as the same if all of its tokens
are. Another batch shape rounds otherwise, so that in bfloat16 some draws fall otherwise.

"Ranks, all images" is what this project computed before: the noise of a draw belonged to a token's rank among the
likeliest, and under the conventions of transformers a token before its image attended to the images that fill up the
batch. "Ids, all images" has the noise of a token belong to its id. "Ids, own images" is what it computes now.
"""

import argparse
import datetime
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from flax.traverse_util import flatten_dict

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_cot_jax.inference import decoding, sampling  # noqa: E402
from llava_cot_jax.model.convention import Convention  # noqa: E402
from llava_cot_jax.model.image_context import cross_attention_mask  # noqa: E402
from llava_cot_jax.model.mllama import Mllama  # noqa: E402
from llava_cot_jax.processing.processor import Processor  # noqa: E402
from llava_cot_jax.search.program import search  # noqa: E402
from llava_cot_jax.search.request_builder import RequestBuilder  # noqa: E402
from llava_cot_jax.search.scorers import LogProbability  # noqa: E402
from llava_cot_jax.search.strategies import BestOfN  # noqa: E402
from tests.search.models import random_model, scene  # noqa: E402

COUNTS = (0, 1, 3)
"""Numbers of images of the questions."""

BATCHES = 8
STRATEGY = BestOfN(8, LogProbability(), temperature=1.0, max_new_tokens=24)
CASES = {
    "ranks, all images": (True, True),
    "ids, all images": (False, True),
    "ids, own images": (False, False),
}
"""Whether noise belongs to ranks, and whether a token without an image sees the images that fill up the batch."""


def noise_of_ranks(keys: Any, ids: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.gumbel(key, ids.shape[1:]))(keys)


def masks_of_the_batch(config: Any, mask: Any, is_image: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Masks under which only a question without any image was kept from those of its neighbours."""
    tile_mask, attention_gate, mlp_gate = cross_attention_mask(config, mask)
    return tile_mask, attention_gate & is_image.any(axis=1, keepdims=True), mlp_gate


Question = tuple[list[Any], str, int]
"""Images, text and seed."""


def questions(batch: int) -> list[Question]:
    """Return the questions of a batch, about pictures and in words that no other question has."""
    found = []
    for i, count in enumerate(COUNTS):
        seed = batch * len(COUNTS) + i
        first = seed * max(COUNTS)
        found.append(([scene(first + place)[0] for place in range(count)], scene(first)[1], seed))
    return found


def candidates(model: Mllama, builder: RequestBuilder, asked: list[Question]) -> np.ndarray:
    """Return the tokens of the candidates of questions that are answered side by side, [questions, candidates, n]."""
    images, texts, seeds = (list(x) for x in zip(*asked, strict=True))
    inputs = builder.build(images, texts, seeds).inputs
    static = {"config": model.config, "spec": builder.spec, "prefill_chunk": 64, "mesh": None}
    result = search(model.params, inputs, builder.stage_tables, builder.scorer_tables, **static)
    return np.asarray(result.candidates.tokens[0])


def count_the_same(model: Mllama, processor: Processor) -> str:
    """Return how many candidates are the same alone, and the shares by number of images."""
    builder = RequestBuilder(processor, STRATEGY)
    same = np.zeros((BATCHES, len(COUNTS), STRATEGY.num_candidates), bool)
    for batch in range(BATCHES):
        asked = questions(batch)
        beside = candidates(model, builder, asked)
        for i, question in enumerate(asked):
            same[batch, i] = (candidates(model, builder, [question])[0] == beside[i]).all(axis=-1)
    shares = ", ".join(f"{share:.0%}" for share in same.mean(axis=(0, 2)))
    return f"{same.sum()} of {same.size} ({shares})"


def models(dtype: str) -> Iterator[tuple[str, Mllama, Processor]]:
    """Yield a random model under each convention, and the trained one of the package, which has ``meta``."""
    for convention in get_args(Convention):
        model, processor = random_model(3, convention=convention, eos=())
        arrays = {path: x.astype(dtype) for path, x in flatten_dict(model.params, sep=".").items()}
        yield f"random, {convention}", Mllama.from_arrays(model.config, arrays, layout="unrolled"), processor
    yield "trained, meta", Mllama.from_pretrained("shapes", dtype=dtype), Processor.from_pretrained("shapes")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{datetime.date.today()}; jax {version('jax')}; {jax.devices()[0].device_kind}")
    print("candidates that are the same alone (and the shares of those of questions with 0, 1 and 3 images):")
    noise, masks = sampling.gumbel_noise, cross_attention_mask
    for dtype in ("float32", "bfloat16"):
        for name, model, processor in models(dtype):
            for case, (of_ranks, of_the_batch) in CASES.items():
                jax.clear_caches()  # which do not know what the functions below are
                sampling.gumbel_noise = noise_of_ranks if of_ranks else noise
                decoding.cross_attention_mask = masks_of_the_batch if of_the_batch else masks
                print(f"{dtype}, {name}, {case}: {count_the_same(model, processor)}", flush=True)


if __name__ == "__main__":
    main()
