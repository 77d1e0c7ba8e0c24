"""Prefill of tokens into a KV cache, and sampling of tokens after them.

Both are loops around ``text_decoder.forward_with_cache``. The number of their steps follows the lengths of the
sequences; the compiled program does not depend on them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.ragged_tokens import RaggedTokens
from llava_cot_jax.inference.sampling import sample_token
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model import text_decoder
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.image_context import ImageContext, cross_attention_mask
from llava_cot_jax.model.kv_cache import CacheLayers, KVCache, init_cache
from llava_cot_jax.model.mllama import compute_logits, cross_attention_states
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.rounding import round_up_to_power_of_two

SMALLEST_BUCKET = 64


class EndReason(IntEnum):
    """Reason why a sample ended."""

    TAG = 0
    """A stop string, such as a closing tag, is complete."""
    EOS = 1
    """The model sampled an end-of-sequence token."""
    MAX_NEW_TOKENS = 2
    """The sample has as many tokens as it may have."""
    UNUSED = 3
    """Nothing was sampled at all."""


def bucket(length: int) -> int:
    """Return the length that ``length`` tokens are padded to: a power of two, so that few shapes are compiled."""
    return max(SMALLEST_BUCKET, round_up_to_power_of_two(length))


def nonfinite_logits_error(where: str, dtype: Any) -> UserError:
    """Return the error of an answer whose logits are NaN or infinite, so that no token of it has a meaning.

    Args:
        where: Words that say which answer, and where in it.
        dtype: Dtype of the model.
    """
    wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(jnp.dtype(dtype).name)
    remedy = f"its activations may overflow in {jnp.dtype(dtype).name}: choose {wider} as dtype" if wider else ""
    return UserError(
        f"the model's logits are not finite {where}, so that it has no answer: "
        + (remedy or "its weights are too large, or the image holds numbers that are not finite")
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoder:
    """A model and the images of a batch of questions: what prefill and sampling both take.

    Attributes:
        params: Parameters of the model, in the unrolled layout.
        config: Configuration of the model.
        images: Images of the questions; None where no question has one.
        prefill_chunk: Number of tokens of each sequence that ``prefill`` processes at a time.
    """

    params: Params
    config: MllamaConfig = field(metadata={"static": True})
    images: ImageContext | None
    prefill_chunk: int = field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        """Dtype of the parameters, and so of the activations and the KV cache."""
        return self.params["language_model"]["model"]["norm"]["weight"].dtype

    def init_cache(self, batch: int, capacity: int) -> CacheLayers:
        """Return zeros for ``capacity`` tokens of each sequence in every self-attention layer."""
        return init_cache(self.config.text, batch, capacity, self.dtype)

    def forward(
        self,
        input_ids: Int[Array, "batch tokens"],
        cache: KVCache,
        text_only: Bool[Array, " questions"] | bool = False,
        adapted: Bool[Array, "batch tokens"] | None = None,
    ) -> tuple[Float[Array, "batch tokens hidden"], CacheLayers]:
        """Return the hidden states of tokens after ``cache``, and its suffix with the tokens' keys and values.

        The verifier's adapter, where the parameters have one, acts on the tokens for which ``adapted`` is true; None is
        no token.
        """
        images = None if self.images is None else self.images.at(cache.positions(input_ids.shape[1]), text_only)
        text_params = self.params["language_model"]["model"]
        return text_decoder.forward_with_cache(text_params, self.config, input_ids, cache, images, adapted)

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Return the float32 logits of hidden states."""
        return compute_logits(self.params, hidden)


@jax.named_scope("encode_images")
def encode_images(
    params: Params, config: MllamaConfig, inputs: Mapping[str, jax.Array], lengths: Int[Array, " questions"]
) -> ImageContext | None:
    """Run the vision tower on the images of prompts. This is its only run.

    Each prompt sees its own images alone, as in a batch of one, whatever convention the model follows.

    Args:
        params: Parameters of the model, in the unrolled layout.
        config: Configuration of the model.
        inputs: Arrays by the names of the arguments of ``Mllama``, padded on the right.
        lengths: int32, number of tokens of each prompt.

    Returns:
        Keys, values and masks of the images; None where there are none.
    """
    if "pixel_values" not in inputs:
        return None
    text_params = params["language_model"]["model"]
    states = cross_attention_states(params, config, inputs)
    layers = text_decoder.image_keys_values(text_params, config.text, states)
    is_image = inputs["aspect_ratio_ids"] > 0  # the id of what fills up a batch is 0
    masks = cross_attention_mask(config, inputs["cross_attention_mask"], is_image)
    return ImageContext(*masks, layers=layers, last_token=lengths - 1)


@jax.named_scope("prefill")
def prefill(
    decoder: Decoder,
    tokens: RaggedTokens,
    cache: KVCache,
    *,
    text_only: Bool[Array, " questions"] | bool = False,
    adapted_from: Int[Array, " batch"] | None = None,
) -> tuple[CacheLayers, Float[Array, "batch vocab"]]:
    """Append known tokens to sequences, chunk by chunk, as many chunks as the longest sequence needs.

    A sequence whose tokens are all appended writes, while others go on, beyond its last token alone. So the tokens that
    its cache holds stay as they are, however many or few are appended to it.

    Args:
        decoder: Model and images.
        tokens: Tokens to append, [batch]. The cache needs room for a chunk more than there are.
        cache: Keys and values of the tokens before them.
        text_only: Whether a question's tokens see no image.
        adapted_from: int32, index of the first token of each sequence that the verifier's adapter acts on; None for no
            token.

    Returns:
        The suffix of the cache with the tokens' keys and values, and float32 logits after each sequence's last token:
        those of a hidden state of zeros for an empty sequence.
    """
    chunk, batch = decoder.prefill_chunk, tokens.lengths.shape[0]
    padded = jnp.pad(tokens.tokens, ((0, 0), (0, -tokens.capacity % chunk)))
    last_hidden = jnp.zeros((batch, decoder.config.text.hidden_size), decoder.dtype)

    Carry = tuple[jax.Array, CacheLayers, jax.Array]

    def unfinished(carry: Carry) -> jax.Array:
        return carry[0] < tokens.lengths.max()

    def prefill_chunk(carry: Carry) -> Carry:
        done, suffix, last_hidden = carry
        now = replace(cache, suffix=suffix, lengths=cache.lengths + jnp.minimum(done, tokens.lengths))
        input_ids = jax.lax.dynamic_slice(padded, (0, done), (batch, chunk))
        adapted = None if adapted_from is None else done + jnp.arange(chunk) >= adapted_from[:, None]
        hidden, suffix = decoder.forward(input_ids, now, text_only, adapted)
        last = (tokens.lengths - 1 - done)[:, None, None]  # [batch, 1, 1], index of the last token in this chunk
        at_last = jnp.take_along_axis(hidden, jnp.clip(last, 0, chunk - 1), axis=1)[:, 0]
        last_hidden = jnp.where((last[:, 0] >= 0) & (last[:, 0] < chunk), at_last, last_hidden)
        return done + chunk, suffix, last_hidden

    _, suffix, last_hidden = jax.lax.while_loop(unfinished, prefill_chunk, (jnp.int32(0), cache.suffix, last_hidden))
    return suffix, decoder.logits(last_hidden)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """Sampled tokens of a batch of sequences.

    Attributes:
        tokens: int32, the tokens, and padding after the last.
        lengths: int32, number of tokens of text: an end-of-sequence token is not counted.
        ended: int32, why each sample ended: a value of ``EndReason``.
        state: int32, state of the stop table after the last token.
        log_prob: float32, sum of the log-probabilities of all tokens sampled, the end-of-sequence token among them,
            as the model gives them: before temperature, top_k and top_p.
    """

    tokens: Int[Array, "*batch capacity"]
    lengths: Int[Array, "*batch"]
    ended: Int[Array, "*batch"]
    state: Int[Array, "*batch"]
    log_prob: Float[Array, "*batch"]

    @property
    def text(self) -> RaggedTokens:
        """The tokens of text."""
        return RaggedTokens(self.tokens, self.lengths)

    @property
    def num_cached(self) -> jax.Array:
        """Number of tokens of text whose keys and values are sure to be in the suffix of the cache, int32.

        The last token is sampled, but not computed with.
        """
        return jnp.maximum(self.lengths - 1, 0)

    @property
    def last_token(self) -> RaggedTokens:
        """The tokens of text that ``num_cached`` does not count: the last one, or none where there is no text."""
        token = jnp.take_along_axis(self.tokens, self.num_cached[..., None], axis=-1)
        return RaggedTokens(token, self.lengths - self.num_cached)

    @property
    def num_sampled(self) -> jax.Array:
        """Number of tokens sampled, an end-of-sequence token counted, int32."""
        return self.lengths + (self.ended == EndReason.EOS)

    @property
    def mean_log_prob(self) -> Float[Array, "*batch"]:
        """Mean log-probability of a token of each sample, float32; -inf where nothing was sampled."""
        mean = self.log_prob / jnp.maximum(self.num_sampled, 1)
        return jnp.where(self.ended == EndReason.UNUSED, -jnp.inf, mean)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StopConditions:
    """When the samples of a batch end, and what they are drawn with. Every sequence may have conditions of its own.

    Attributes:
        stop_tables: State after a token in each table, as ``stop_strings.compile_stop_table`` makes it; a sample ends
            in the states from ``states`` on.
        table: int32, the stop table of each sequence.
        max_new_tokens: int32, largest number of tokens of a sample, at least 1.
        temperature: float32, temperature of the draws.
        keys: Random keys; each draw's is folded from its sequence's key and the number of draws before it.
        used: Whether to sample a sequence at all.
        state: int32, state of the stop table before the first token of each sequence; None is the start.
    """

    stop_tables: UInt8[Array, "tables states vocab"]
    table: Int[Array, " batch"]
    max_new_tokens: Int[Array, " batch"]
    temperature: Float[Array, " batch"]
    keys: Key[Array, " batch"]
    used: Bool[Array, " batch"]
    state: Int[Array, " batch"] | None = None

    def unfinished(self, samples: Samples) -> Bool[Array, " batch"]:
        """Return whether a sample goes on: no other reason ended it, and it has fewer tokens than it may have."""
        return (samples.ended == EndReason.MAX_NEW_TOKENS) & (samples.lengths < self.max_new_tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OpenSamples:
    """Samples that can be continued.

    Attributes:
        samples: The samples so far. One that goes on has ``EndReason.MAX_NEW_TOKENS`` until another reason applies.
        token: int32, the last token drawn, whose keys and values are not in the cache yet.
    """

    samples: Samples
    token: Int[Array, " batch"]


@jax.named_scope("sample")
def sample(
    decoder: Decoder,
    logits: Float[Array, "batch vocab"],
    cache: KVCache,
    stop: StopConditions,
    *,
    capacity: int,
    sampling: Sampling,
    text_only: Bool[Array, " questions"] | bool = False,
) -> tuple[CacheLayers, Samples]:
    """Sample tokens after sequences until each has ended.

    Args:
        decoder: Model and images.
        logits: float32 logits of the first token.
        cache: Keys and values of the tokens before it, with room for ``capacity`` tokens more.
        stop: When to stop, and what to draw with.
        capacity: Number of tokens that the result has room for, at least the largest of ``stop.max_new_tokens``.
        sampling: top_k and top_p; with its temperature 0, every draw takes the likeliest token.
        text_only: Whether a question's tokens see no image.

    Returns:
        The suffix of the cache with the samples' keys and values, and the samples. The last token of a sample may be
        missing from the cache.
    """
    start = start_samples(decoder.config, logits, stop, capacity=capacity, sampling=sampling)
    suffix, end = continue_samples(decoder, start, cache, stop, sampling=sampling, text_only=text_only)
    return suffix, end.samples


def start_samples(
    config: MllamaConfig,
    logits: Float[Array, "batch vocab"],
    stop: StopConditions,
    *,
    capacity: int,
    sampling: Sampling,
) -> OpenSamples:
    """Draw the first token of samples; the arguments are those of ``sample``."""
    batch, text = logits.shape[0], config.text
    zeros = jnp.zeros(batch, jnp.int32)
    none = Samples(
        tokens=jnp.full((batch, capacity), text.pad_token_id, jnp.int32),
        lengths=zeros,
        ended=jnp.where(stop.used, EndReason.MAX_NEW_TOKENS, EndReason.UNUSED).astype(jnp.int32),
        state=zeros if stop.state is None else stop.state,
        log_prob=jnp.zeros(batch, jnp.float32),
    )
    return _draw(config, logits, OpenSamples(none, zeros), stop, sampling)


def continue_samples(
    decoder: Decoder,
    start: OpenSamples,
    cache: KVCache,
    stop: StopConditions,
    *,
    sampling: Sampling,
    text_only: Bool[Array, " questions"] | bool = False,
    goes_on: Callable[[Bool[Array, " batch"]], Bool[Array, ""]] = jnp.any,
) -> tuple[CacheLayers, OpenSamples]:
    """Continue samples, which may have been started at different times.

    Args:
        decoder: Model and images.
        start: The samples so far.
        cache: Keys and values; its ``lengths`` are those before the first token of each sample.
        stop: When to stop, and what to draw with.
        sampling: top_k and top_p, as in ``sample``.
        text_only: Whether a question's tokens see no image.
        goes_on: Function that takes whether each sample is unfinished, and returns whether to draw another token of
            these; by default, until none is unfinished.

    Returns:
        The suffix of the cache, and the samples.
    """
    Carry = tuple[CacheLayers, OpenSamples]

    def unfinished(carry: Carry) -> jax.Array:
        return goes_on(stop.unfinished(carry[1].samples))

    def body(carry: Carry) -> Carry:
        suffix, so_far = carry
        # A sample that has ended writes its last token again.
        lengths = cache.lengths + jnp.maximum(so_far.samples.num_sampled - 1, 0)
        hidden, suffix = decoder.forward(
            so_far.token[:, None], replace(cache, suffix=suffix, lengths=lengths), text_only
        )
        return suffix, _draw(decoder.config, decoder.logits(hidden[:, 0]), so_far, stop, sampling)

    return jax.lax.while_loop(unfinished, body, (cache.suffix, start))


def _draw(
    config: MllamaConfig,
    logits: Float[Array, "batch vocab"],
    so_far: OpenSamples,
    stop: StopConditions,
    sampling: Sampling,
) -> OpenSamples:
    """Draw the next token of every sample that is unfinished."""
    samples, text = so_far.samples, config.text
    active = stop.unfinished(samples)
    drawn = samples.lengths  # number of draws so far, where the sample is active
    token = sample_token(logits, jax.vmap(jax.random.fold_in)(stop.keys, drawn), sampling, stop.temperature)
    eos = jnp.isin(token, jnp.array(text.eos_token_ids, jnp.int32))
    is_text = active & ~eos
    new_state = stop.stop_tables[stop.table, samples.state, token].astype(jnp.int32)
    state = jnp.where(is_text, new_state, samples.state)
    ended = jnp.where(is_text & (state >= stop.stop_tables.shape[1]), EndReason.TAG, samples.ended)
    log_prob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    sequence, capacity = jnp.arange(token.shape[0]), samples.tokens.shape[1]
    new = Samples(
        tokens=samples.tokens.at[sequence, jnp.where(is_text, drawn, capacity)].set(token, mode="drop"),
        lengths=samples.lengths + is_text,
        ended=jnp.where(active & eos, EndReason.EOS, ended),
        state=state,
        log_prob=samples.log_prob + jnp.where(active, log_prob, 0),
    )
    return OpenSamples(new, jnp.where(active, token, so_far.token))
