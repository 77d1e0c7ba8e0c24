"""Time a draw with top_k for three kinds of noise.

    python tests/evidence/noise.py | tee tests/evidence/noise.txt

"Ranks" gives a noise to each of the likeliest tokens by their order, so that two tokens that change places change
noises too. "Ids" is what this project computes: it hashes the key and the id of each token that is kept. "Gathered"
draws noise for the whole vocabulary and takes that of the tokens that are kept. Times are those of the fastest of 30
draws for a whole batch, with the search for the likeliest tokens, over a vocabulary of 128256.
"""

import argparse
import datetime
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from llava_cot_jax.inference.sampling import gumbel_noise

VOCABULARY = 128_256
REPEATS = 30


def ranks(keys: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.gumbel(key, ids.shape[1:]))(keys)


def gathered(keys: jax.Array, ids: jax.Array) -> jax.Array:
    whole = jax.vmap(lambda key: jax.random.gumbel(key, (VOCABULARY,)))(keys)
    return jnp.take_along_axis(whole, ids, axis=-1)


def milliseconds(noise: Callable[[jax.Array, jax.Array], jax.Array], batch: int, top_k: int | None) -> float:
    """Return the time of a draw for ``batch`` sequences."""

    @jax.jit
    def draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
        if top_k is None:
            scaled, ids = logits, jnp.broadcast_to(jnp.arange(VOCABULARY), logits.shape)
        else:
            scaled, ids = jax.lax.top_k(logits, top_k)
        choice = jnp.argmax(scaled + noise(keys, ids), axis=-1)
        return jnp.take_along_axis(ids, choice[:, None], axis=-1)

    logits = np.random.default_rng(0).normal(0, 3, (batch, VOCABULARY)).astype(np.float32)
    arguments = jax.random.split(jax.random.key(0), batch), jnp.asarray(logits)
    jax.block_until_ready(draw(*arguments))
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(draw(*arguments))
        seconds.append(time.perf_counter() - began)
    return 1e3 * min(seconds)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{datetime.date.today()}; jax {version('jax')}; {jax.devices()[0].device_kind}; ms for a batch")
    print("top_k  batch   ranks     ids  gathered")
    for top_k in (50, None):
        for batch in (4, 10, 40):
            times = [milliseconds(noise, batch, top_k) for noise in (ranks, gumbel_noise, gathered)]
            print(f"{top_k or 'none':>5} {batch:6} {times[0]:7.2f} {times[1]:7.2f} {times[2]:9.2f}")


if __name__ == "__main__":
    main()
