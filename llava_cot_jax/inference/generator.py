"""Answers, token by token: one compiled prefill, then a compiled loop that returns every few steps."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import View, bucket, look, read
from llava_cot_jax.inference.ragged_tokens import Pieces
from llava_cot_jax.inference.sampling import draw
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model import text_decoder
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.kv_cache import Memory, empty
from llava_cot_jax.model.layers import Weights
from llava_cot_jax.model.mllama import Mllama, check_inputs, logits
from llava_cot_jax.model.sharding import on_mesh

CHUNK = 16
"""Steps of the compiled loop before the host sees the tokens."""

PREFILL_CHUNK = 256
"""Tokens of a prompt that are read at a time, at most."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where the decoding of a batch stands.

    Attributes:
        memory: keys and values of every token but the last, and of the images.
        view: what the tokens see of the images.
        token: int32 [batch], the last token drawn, not in the memory yet.
        done: bool [batch], whether it, or one before it, ended the answer.
        keys: [batch], random keys; a draw's is folded from its row's and the position it draws for.
    """

    memory: Memory
    view: View
    token: jax.Array
    done: jax.Array
    keys: jax.Array


def _settle(state: State, scores: jax.Array, config: MllamaConfig, sampling: Sampling) -> State:
    """``state`` after the draw of its next token from ``scores`` [batch, vocabulary]."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.memory.start)
    token = jnp.where(state.done, config.text.pad_token_id, draw(scores, keys, sampling))
    ended = jnp.isin(token, jnp.array(config.text.eos_token_ids, jnp.int32))
    return replace(state, token=token, done=state.done | ended)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "capacity", "mesh"))
def _begin(
    params: Weights,
    inputs: Mapping[str, jax.Array],
    lengths: jax.Array,
    seeds: jax.Array,
    *,
    config: MllamaConfig,
    sampling: Sampling,
    capacity: int,
    mesh: Mesh | None,
) -> State:
    """Read the prompts and draw the first token of each answer."""
    with on_mesh(mesh):
        prompts = Pieces(inputs["input_ids"], lengths)
        view = look(params, config, inputs, lengths)
        dtype = params["language_model"]["model"]["norm"]["weight"].dtype
        nothing = jnp.zeros_like(lengths)
        memory = Memory(empty(config.text, len(lengths), capacity, dtype), nothing, None, view.images)
        own, scores = read(params, config, prompts, memory, view, chunk=min(PREFILL_CHUNK, prompts.capacity))
        read_in = replace(memory, own=own, start=lengths)
        keys = jax.vmap(jax.random.key)(seeds)
        waiting = State(read_in, view, nothing, jnp.zeros(lengths.shape, bool), keys)
        return _settle(waiting, scores, config, sampling)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "steps", "mesh"), donate_argnames="state")
def _advance(
    params: Weights,
    state: State,
    limit: jax.Array,
    *,
    config: MllamaConfig,
    sampling: Sampling,
    steps: int,
    mesh: Mesh | None,
) -> tuple[State, jax.Array, jax.Array]:
    """Draw up to ``steps`` more tokens, at most ``limit``, fewer once every answer has ended.

    Returns:
        The state, the tokens int32 [batch, steps], and how many of them were drawn.
    """

    def unfinished(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        drawn, state, _ = carry
        return (drawn < steps) & (drawn < limit) & ~state.done.all()

    def body(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
        drawn, state, tokens = carry
        memory, decoder = state.memory, params["language_model"]["model"]
        sight = state.view.at(memory.positions(1))
        hidden, own = text_decoder.append(decoder, config, state.token[:, None], memory, sight)
        state = replace(state, memory=replace(memory, own=own, start=memory.start + 1))
        state = _settle(state, logits(params, hidden[:, 0]), config, sampling)
        return drawn + 1, state, jax.lax.dynamic_update_slice(tokens, state.token[:, None], (0, drawn))

    with on_mesh(mesh):
        tokens = jnp.full((state.token.shape[0], steps), config.text.pad_token_id, jnp.int32)
        drawn, state, tokens = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, tokens))
        return state, tokens, drawn


class Generator:
    """Continues prompts with a model.

    Prompts and answers are padded to buckets, so a second question of similar length compiles nothing.

    Args:
        model: in the unrolled layout.
        sampling: how tokens are drawn.

    Raises:
        UserError: the model's layers are stacked.
    """

    def __init__(self, model: Mllama, sampling: Sampling | None = None) -> None:
        if model.layout != "unrolled":
            raise UserError("a stacked model keeps no cache: call model.to_layout('unrolled') before decoding")
        self._params = model.params
        self._settings: dict[str, Any] = {
            "config": model.config,
            "sampling": sampling or Sampling(),
            "mesh": model.mesh,
        }
        self.config = model.config

    def stream(
        self, inputs: Mapping[str, np.ndarray], *, max_new_tokens: int, seeds: Sequence[int] | int = 0
    ) -> Iterator[np.ndarray]:
        """The new tokens as they come.

        Args:
            inputs: what a processor returns for prompts, padded on either side.
            max_new_tokens: the most tokens to draw for each prompt.
            seeds: of each row's draws, or of every row's.

        Yields:
            int32 [batch, n], the next n tokens of every row: the first alone, then up to ``CHUNK``.
            After a token that ends a row's answer the row is padding.

        Raises:
            UserError: anything that ``check_inputs`` or ``check_request`` refuses.
        """
        check_inputs(self.config, inputs)
        prompts, lengths = in_bucket(self.config, inputs)
        check_request(self.config, int(lengths.max()), max_new_tokens, seeds)
        capacity = prompts["input_ids"].shape[1] + bucket(max_new_tokens)
        rows = np.broadcast_to(np.asarray(seeds, np.uint32), lengths.shape)
        state = _begin(self._params, prompts, lengths, rows, capacity=capacity, **self._settings)
        token, done = jax.device_get((state.token, state.done))
        yield token[:, None]
        left = max_new_tokens - 1
        while left > 0 and not done.all():
            limit = np.int32(left)
            state, tokens, drawn = _advance(self._params, state, limit, steps=CHUNK, **self._settings)
            tokens, drawn, done = jax.device_get((tokens, drawn, state.done))
            yield tokens[:, :drawn]
            left -= int(drawn)

    def generate(
        self, inputs: Mapping[str, np.ndarray], *, max_new_tokens: int, seeds: Sequence[int] | int = 0
    ) -> np.ndarray:
        """All new tokens, int32 [batch, new]; arguments and errors as for ``stream``."""
        return np.concatenate(list(self.stream(inputs, max_new_tokens=max_new_tokens, seeds=seeds)), axis=1)


def check_request(config: MllamaConfig, prompt: int, new: int, seeds: Sequence[int] | int) -> None:
    """Whether ``new`` tokens can be drawn with these seeds after a prompt of so many tokens.

    Raises:
        UserError: no new tokens, more than the context holds, or a seed that does not fit 32 bits.
    """
    context = config.text.max_position_embeddings
    if new < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {new}")
    if prompt + new > context:
        raise UserError(
            f"the prompt has {prompt} tokens; with {new} new ones that exceeds the context of {context}: "
            "shorten the question or lower max_new_tokens"
        )
    check_seeds(seeds)


def check_seeds(seeds: Sequence[int] | int) -> None:
    """Whether all are seeds.

    Raises:
        UserError: one does not fit 32 bits.
    """
    for seed in np.atleast_1d(seeds).tolist():
        if not 0 <= seed < 2**32:
            raise UserError(f"a seed must be from 0 to 4294967295, got {seed}")


def in_bucket(config: MllamaConfig, inputs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """``inputs`` padded on the right to their bucket, without an attention mask, and the prompts' lengths [batch].

    Raises:
        UserError: a row is nothing but padding.
    """
    arrays = {name: np.asarray(x) for name, x in inputs.items() if x is not None}
    ids = arrays["input_ids"].astype(np.int32)
    present = arrays.pop("attention_mask", np.ones_like(ids)).astype(bool)
    lengths = present.sum(axis=1, dtype=np.int32)
    if not lengths.all():
        raise UserError(f"row {int(lengths.argmin())} of the batch has no tokens to continue")
    size = bucket(int(lengths.max()))

    def packed(x: np.ndarray, fill: int) -> np.ndarray:
        out = np.full((x.shape[0], size, *x.shape[2:]), fill, x.dtype)
        for row, (length, here) in enumerate(zip(lengths, present, strict=True)):
            out[row, :length] = x[row, here]
        return out

    arrays["input_ids"] = packed(ids, config.text.pad_token_id)
    if "cross_attention_mask" in arrays:
        arrays["cross_attention_mask"] = packed(arrays["cross_attention_mask"].astype(np.uint8), 0)
    for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        if name in arrays:
            arrays[name] = arrays[name].astype(np.int32)
    return arrays, lengths
