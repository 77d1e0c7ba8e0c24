"""Generation of answers: one compiled prefill, then a compiled loop that returns every few steps."""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from llava_cot_jax.checks import check_instance, check_int
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.completions import Completion, GrowingCompletion, check_stop
from llava_cot_jax.inference.decoding import Decoder, bucket, encode_images, nonfinite_logits_error, prefill
from llava_cot_jax.inference.ragged_tokens import RaggedTokens
from llava_cot_jax.inference.sampling import sample_token
from llava_cot_jax.inference.settings import DEFAULT_MAX_NEW_TOKENS, Sampling
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.image_context import ImageContext
from llava_cot_jax.model.inputs import ArrayLike, as_arrays, check_inputs
from llava_cot_jax.model.kv_cache import KVCache, constrain_batch
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import to_host, use_mesh, without_surroundings
from llava_cot_jax.processing.processor import Processor

STEPS_PER_CALL = 16
"""Largest number of decoding steps of the compiled loop before the host sees the tokens."""

PREFILL_CHUNK = 256
"""Largest number of tokens of a prompt that are processed at a time."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """State of the decoding of a batch.

    Attributes:
        cache: Keys and values of every token but the last.
        images: Images of the prompts; None where there are none.
        token: int32, the last token sampled, whose keys and values are not in the cache yet.
        log_prob: float32, natural log-probability of that token, before temperature, top_k and top_p; 0 for padding.
        done: Whether that token, or one before it, ended the answer.
        finite: Whether the largest logit of every token so far is finite. It is not where any logit is NaN or infinity.
        keys: Random keys; each draw's is folded from its sequence's key and the position it draws for.
    """

    cache: KVCache
    images: ImageContext | None
    token: Int[Array, " batch"]
    log_prob: Float[Array, " batch"]
    done: Bool[Array, " batch"]
    finite: Bool[Array, " batch"]
    keys: Key[Array, " batch"]


def _sample_next(
    state: DecodeState, logits: Float[Array, "batch vocab"], config: MllamaConfig, sampling: Sampling
) -> DecodeState:
    """Return the state after its next token is drawn from ``logits``."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.cache.lengths)
    drawn = sample_token(logits, keys, sampling)
    log_prob = jnp.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    token = jnp.where(state.done, config.text.pad_token_id, drawn)
    ended = jnp.isin(token, jnp.array(config.text.eos_token_ids, jnp.int32))
    finite = state.finite & (state.done | jnp.isfinite(logits.max(axis=-1)))
    log_prob = jnp.where(state.done, 0, log_prob)
    return replace(state, token=token, log_prob=log_prob, done=state.done | ended, finite=finite)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "capacity", "mesh"))
def _prefill_prompts(
    params: Params,
    inputs: Mapping[str, jax.Array],
    lengths: Int[Array, " batch"],
    seeds: UInt32[Array, " batch"],
    *,
    config: MllamaConfig,
    sampling: Sampling,
    capacity: int,
    mesh: Mesh | None,
) -> DecodeState:
    """Prefill the prompts and draw the first token of each answer."""
    with use_mesh(mesh):
        prompts = RaggedTokens(inputs["input_ids"], lengths)
        images = encode_images(params, config, inputs, lengths)
        decoder = Decoder(params, config, images, prefill_chunk=min(PREFILL_CHUNK, prompts.capacity))
        zeros = jnp.zeros_like(lengths)
        cache = KVCache(decoder.init_cache(len(lengths), capacity), zeros)
        suffix, logits = prefill(decoder, prompts, cache)
        keys = jax.vmap(jax.random.key)(seeds)
        none, done = jnp.zeros(lengths.shape, jnp.float32), jnp.zeros(lengths.shape, bool)
        state = DecodeState(KVCache(suffix, lengths), images, zeros, none, done, ~done, keys)
        return constrain_batch(_sample_next(state, logits, config, sampling))


@functools.partial(jax.jit, static_argnames=("config", "sampling", "steps", "mesh"), donate_argnames="state")
def _decode_steps(
    params: Params,
    state: DecodeState,
    limit: Int[Array, ""],
    *,
    config: MllamaConfig,
    sampling: Sampling,
    steps: int,
    mesh: Mesh | None,
) -> tuple[DecodeState, Int[Array, "batch {steps}"], Float[Array, "batch {steps}"], Int[Array, ""]]:
    """Sample up to ``steps`` more tokens, at most ``limit``, and fewer once every answer has ended.

    Returns:
        The state, the tokens, their log-probabilities, and how many of them were sampled.
    """
    Carry = tuple[jax.Array, DecodeState, jax.Array, jax.Array]

    def unfinished(carry: Carry) -> jax.Array:
        step, state, _, _ = carry
        return (step < steps) & (step < limit) & ~state.done.all()

    def body(carry: Carry) -> Carry:
        step, state, tokens, log_probs = carry
        decoder = Decoder(params, config, state.images, PREFILL_CHUNK)
        hidden, suffix = decoder.forward(state.token[:, None], state.cache)
        state = replace(state, cache=KVCache(suffix, state.cache.lengths + 1))
        state = _sample_next(state, decoder.logits(hidden[:, 0]), config, sampling)
        tokens = jax.lax.dynamic_update_slice(tokens, state.token[:, None], (0, step))
        return step + 1, state, tokens, jax.lax.dynamic_update_slice(log_probs, state.log_prob[:, None], (0, step))

    with use_mesh(mesh), jax.named_scope("sample"):
        tokens = jnp.full((state.token.shape[0], steps), config.text.pad_token_id, jnp.int32)
        start = jnp.int32(0), state, tokens, jnp.zeros(tokens.shape, jnp.float32)
        sampled, state, tokens, log_probs = jax.lax.while_loop(unfinished, body, start)
        return constrain_batch(state), tokens, log_probs, sampled


class Generator:
    """Generates answers to prompts with a model.

    Prompts and answers are padded to buckets, so a second question of similar length compiles nothing.

    Where the model is on the devices of several processes, all of them make the same calls in the same order, and each
    gets every answer.

    Args:
        model: Model in the unrolled layout.
        sampling: Settings of sampling; by default the likeliest token is taken.
        processor: Processor of the model's checkpoint, which the methods that give text need.
        default_max_new_tokens: Longest answer where a call gives no length, as far as the context leaves room for it.

    Raises:
        UserError: The model's layers are stacked, or an argument is not of its type.
    """

    def __init__(
        self,
        model: Mllama,
        sampling: Sampling | None = None,
        processor: Processor | None = None,
        default_max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> None:
        check_instance("model", model, Mllama, "give an Mllama")
        if processor is not None:
            check_instance("processor", processor, Processor, "give the Processor of the model's checkpoint")
        if sampling is not None:
            check_instance("sampling", sampling, Sampling, "give a Sampling, such as Sampling(temperature=0.6)")
        check_int("default_max_new_tokens", default_max_new_tokens)
        if model.layout != "unrolled":
            raise UserError("a stacked model keeps no cache: call model.to_layout('unrolled') before decoding")
        self._params = model.params
        self._settings: dict[str, Any] = {
            "config": model.config,
            "sampling": sampling or Sampling(),
            "mesh": model.mesh,
        }
        self.config = model.config
        self._processor = processor
        self._default_max_new_tokens = default_max_new_tokens

    def stream(
        self, inputs: Mapping[str, np.ndarray], *, max_new_tokens: int | None = None, seeds: Sequence[int] | int = 0
    ) -> Iterator[np.ndarray]:
        """Yield the new tokens while they are generated.

        Args:
            inputs: Arrays that a processor returns for prompts, padded on either side.
            max_new_tokens: Largest number of tokens to sample for each prompt. By default, what the longest prompt
                leaves of the context, at most ``default_max_new_tokens``; a warning says where that cut an answer.
            seeds: Seed of the draws of each prompt, or one seed for all.

        Yields:
            The next n tokens of every answer, int32 [batch, n]: the first alone, then up to ``STEPS_PER_CALL``. After
            the token that ends an answer comes padding.

        Raises:
            UserError: ``check_inputs`` or ``check_request`` refuses the arguments, or logits are not finite.
        """
        for tokens, *_ in self._pieces(inputs, max_new_tokens, seeds):
            yield tokens

    def _pieces(
        self, inputs: Mapping[str, np.ndarray], max_new_tokens: int | None, seeds: Sequence[int] | int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yield the tokens that ``stream`` yields.

        Each piece comes with its log-probabilities, float32 [batch, n], and the number of tokens that may follow.
        """
        arrays = as_arrays(inputs)
        check_inputs(self.config, arrays)
        prompts, lengths = pad_to_bucket(self.config, arrays)
        longest, default = int(lengths.max()), self._default_max_new_tokens
        new = check_request(self.config, longest, max_new_tokens, seeds, default, len(lengths))
        capacity = prompts["input_ids"].shape[1] + bucket(new)
        each, mesh = np.broadcast_to(np.asarray(seeds, np.uint32), lengths.shape), self._settings["mesh"]
        with without_surroundings():
            state = _prefill_prompts(self._params, prompts, lengths, each, capacity=capacity, **self._settings)
        first = (state.token, state.log_prob, state.done, state.finite)
        token, log_prob, done, finite = to_host(first, mesh)
        self._check_finite(finite, 1)
        left = new - 1
        yield token[:, None], log_prob[:, None], left
        while left > 0 and not done.all():
            limit = np.int32(left)
            with without_surroundings():
                state, *drawn = _decode_steps(self._params, state, limit, steps=STEPS_PER_CALL, **self._settings)
            (tokens, log_probs, sampled), done, finite = to_host((drawn, state.done, state.finite), mesh)
            left -= int(sampled)
            self._check_finite(finite, new - left)
            yield tokens[:, :sampled], log_probs[:, :sampled], left
        if max_new_tokens is None and new < self._default_max_new_tokens and not done.all():
            logging.getLogger(__name__).warning("the answer: %s", cut_by_context(self.config, new))

    def _check_finite(self, finite: np.ndarray, sampled: int) -> None:
        if not finite.all():
            where = f"within the first {sampled} tokens of answer {int(finite.argmin()) + 1}"
            raise nonfinite_logits_error(where, self._params["language_model"]["model"]["norm"]["weight"].dtype)

    def generate(
        self, inputs: Mapping[str, np.ndarray], *, max_new_tokens: int | None = None, seeds: Sequence[int] | int = 0
    ) -> np.ndarray:
        """Return all new tokens, int32 [batch, new]. The arguments and errors are those of ``stream``."""
        return np.concatenate(list(self.stream(inputs, max_new_tokens=max_new_tokens, seeds=seeds)), axis=1)

    def stream_completions(
        self,
        inputs: Mapping[str, np.ndarray],
        *,
        max_new_tokens: int | None = None,
        seeds: Sequence[int] | int = 0,
        stop: Sequence[str] | str = (),
    ) -> Iterator[list[Completion]]:
        """Yield the answers as far as they are generated: texts, tokens and log-probabilities.

        Args:
            inputs: Arrays that a processor returns for prompts, padded on either side.
            max_new_tokens: Largest number of tokens to sample for each prompt; its default is that of ``stream``.
            seeds: Seed of the draws of each prompt, or one seed for all.
            stop: Texts that end an answer where it comes to one of them.

        Yields:
            The completion of each prompt, when its first token is there and then after up to ``STEPS_PER_CALL`` more.
            The last ones yielded have all ended.

        Raises:
            UserError: The generator has no processor, or ``stream`` or ``check_stop`` refuses the arguments.
        """
        if self._processor is None:
            raise UserError("a generator of text needs the processor: Generator(model, processor=processor)")
        strings, rows = check_stop(stop), None
        for tokens, log_probs, left in self._pieces(inputs, max_new_tokens, seeds):
            rows = rows or [GrowingCompletion(self._processor, self.config.text.eos_token_ids, strings) for _ in tokens]
            for row, *piece in zip(rows, tokens, log_probs, strict=True):
                row.extend(*piece, is_last=not left)
            yield [row.now for row in rows]
            if not {row.now.ended for row in rows} & {"", "max_new_tokens"}:
                return  # of the tokens that stop strings have cut off, nothing need be said

    def complete(
        self,
        inputs: Mapping[str, np.ndarray],
        *,
        max_new_tokens: int | None = None,
        seeds: Sequence[int] | int = 0,
        stop: Sequence[str] | str = (),
    ) -> list[Completion]:
        """Return the whole answers. The arguments and errors are those of ``stream_completions``."""
        *_, last = self.stream_completions(inputs, max_new_tokens=max_new_tokens, seeds=seeds, stop=stop)
        return last

    def stream_text(
        self,
        inputs: Mapping[str, np.ndarray],
        *,
        max_new_tokens: int | None = None,
        seeds: Sequence[int] | int = 0,
        stop: Sequence[str] | str = (),
    ) -> Iterator[list[str]]:
        """Yield the new text of each prompt's answer, in whole characters; it is empty where there is none yet.

        The arguments and errors are those of ``stream_completions``. Joined, the texts are those of ``complete``.
        """
        before: list[str] = []
        for completions in self.stream_completions(inputs, max_new_tokens=max_new_tokens, seeds=seeds, stop=stop):
            texts = [completion.text for completion in completions]
            before = before or [""] * len(texts)
            yield [text.removeprefix(earlier) for text, earlier in zip(texts, before, strict=True)]
            before = texts


def check_request(
    config: MllamaConfig,
    prompt: int,
    new: int | None,
    seeds: Sequence[int] | int,
    default: int = DEFAULT_MAX_NEW_TOKENS,
    batch: int = 1,
) -> int:
    """Check that tokens can be sampled after prompts with these seeds, and return the largest number of them.

    Args:
        config: Configuration of the model.
        prompt: Number of tokens of the longest prompt.
        new: Number of tokens that the user gave; None is ``default``, or what the context leaves if that is less.
        seeds: Seed of each prompt, or one for all.
        default: Number of tokens where the user gave none.
        batch: Number of prompts.

    Raises:
        UserError: There are no new tokens, or more than the context holds, or ``check_seeds`` refuses the seeds.
    """
    context = config.text.max_position_embeddings
    if new is None:
        new = min(default, context - prompt)
        if new < 1:
            raise UserError(
                f"the prompt has {prompt} tokens, which leaves no room for an answer in the context of {context}: "
                "shorten the question"
            )
    check_int("max_new_tokens", new)
    if prompt + new > context:
        raise UserError(
            f"the prompt has {prompt} tokens; with {new} new ones that exceeds the context of {context}: "
            "shorten the question or lower max_new_tokens"
        )
    check_seeds(seeds, batch)
    return new


def cut_by_context(config: MllamaConfig, new: int) -> str:
    """Return what is said of an answer, or a stage, that was cut off because the context left less than the default."""
    context = config.text.max_position_embeddings
    return f"cut off after {new} tokens, which is what the prompt left of the model's context of {context}"


def check_seeds(seeds: Sequence[int] | int, batch: int = 1) -> None:
    """Check that there is one seed, or one for each of ``batch`` prompts, and that all fit 32 bits.

    Raises:
        UserError: A seed is no whole number or does not fit 32 bits, or there is another number of seeds.
    """
    seeds_or_one: Any = seeds
    is_several = isinstance(seeds, list | tuple | range) or getattr(seeds, "ndim", 0) > 0
    given: list[Any] = list(seeds_or_one) if is_several else [seeds_or_one]
    for seed in given:
        check_int("seed", seed, least=None)
        if not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed}; it must be from 0 to 4294967295")
    if len(given) not in (1, batch):
        raise UserError(f"{len(given)} seeds for {batch} prompts: give one seed, or one for each")


def pad_to_bucket(config: MllamaConfig, inputs: Mapping[str, ArrayLike]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return ``inputs`` padded on the right to their bucket, without an attention mask, and the lengths of the prompts.

    Raises:
        UserError: A prompt is nothing but padding, or an array is being traced.
    """
    if traced := [name for name, x in inputs.items() if isinstance(x, jax.core.Tracer)]:
        raise UserError(
            f"{', '.join(traced)} has no values inside jax.jit, which generation needs: call it outside, where it runs "
            "compiled programs of its own"
        )
    arrays = {name: np.asarray(x) for name, x in inputs.items() if x is not None}
    ids = arrays["input_ids"].astype(np.int32)
    present = arrays.pop("attention_mask", np.ones_like(ids)).astype(bool)
    lengths = present.sum(axis=1, dtype=np.int32)
    if not lengths.all():
        raise UserError(f"row {int(lengths.argmin())} of the batch has no tokens to continue")
    size = bucket(int(lengths.max()))

    def pad_right(x: np.ndarray, value: int) -> np.ndarray:
        out = np.full((x.shape[0], size, *x.shape[2:]), value, x.dtype)
        for row, (length, here) in enumerate(zip(lengths, present, strict=True)):
            out[row, :length] = x[row, here]
        return out

    arrays["input_ids"] = pad_right(ids, config.text.pad_token_id)
    if "cross_attention_mask" in arrays:
        arrays["cross_attention_mask"] = pad_right(arrays["cross_attention_mask"].astype(np.uint8), 0)
    for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        if name in arrays:
            arrays[name] = arrays[name].astype(np.int32)
    return arrays, lengths
