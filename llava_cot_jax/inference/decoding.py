"""Reading tokens into sequences and drawing tokens after them, over a cache in two parts.

Both are loops around ``model.text_decoder.append``. What a loop costs follows the lengths of its rows; what it
compiles to does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from llava_cot_jax.inference.ragged_tokens import Pieces
from llava_cot_jax.inference.sampling import draw
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model import text_decoder
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.kv_cache import Layers, Memory
from llava_cot_jax.model.layers import Weights
from llava_cot_jax.model.mllama import image_states, logits

SMALLEST_BUCKET = 64

TAG, EOS, BUDGET, UNUSED = range(4)
"""What ended a row: the string that was looked for, an end-of-sequence token, its budget; or it was never begun."""

ENDS = ("tag", "eos", "budget", "unused")


def bucket(length: int) -> int:
    """The length that ``length`` tokens are padded to: a power of two, so that few shapes are compiled."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """What sequences see of their question's images.

    Attributes:
        images: keys and values of the cross-attention layers; None in each without images.
        sight: of every token of the prompt, [questions, tokens]; None without images.
        last: int32 [questions], the prompt's last token, after which nothing changes.
    """

    images: Layers
    sight: text_decoder.Sight | None
    last: jax.Array

    def at(self, positions: jax.Array, blind: jax.Array | bool = False) -> text_decoder.Sight | None:
        """What the tokens at ``positions`` int32 [rows, n] of sequences that begin as the prompt see.

        Rows are those of the first question first. Where ``blind``, they see nothing: no cross layer adds anything.
        """
        if self.sight is None:
            return None
        rows, tokens = positions.shape
        index = positions.reshape(self.last.shape[0], -1)
        seen = self.sight.at(jnp.minimum(index, self.last[:, None]))
        attends, feeds = (x.reshape(rows, tokens) & ~jnp.asarray(blind) for x in (seen.attends, seen.feeds))
        return text_decoder.Sight(seen.tokens.reshape(rows, tokens, -1), attends, feeds)


def look(params: Weights, config: MllamaConfig, inputs: Mapping[str, jax.Array], lengths: jax.Array) -> View:
    """Look at the images of prompts: the one run of the vision tower.

    Args:
        params: the model's, unrolled.
        config: the model's.
        inputs: by the names of ``Mllama``'s arguments, padded on the right.
        lengths: int32 [questions], tokens of each prompt.
    """
    if "pixel_values" not in inputs:
        return View((None,) * config.text.num_hidden_layers, None, lengths - 1)
    decoder = params["language_model"]["model"]
    images = text_decoder.image_keys_values(decoder, config.text, image_states(params, config, inputs))
    return View(images, text_decoder.see(config, inputs["cross_attention_mask"]), lengths - 1)


def read(
    params: Weights,
    config: MllamaConfig,
    pieces: Pieces,
    memory: Memory,
    view: View,
    *,
    chunk: int,
    blind: jax.Array | bool = False,
) -> tuple[Layers, jax.Array]:
    """Append rows of tokens, ``chunk`` of them at a time, as many times as the longest row needs.

    Args:
        params: the model's, unrolled.
        config: the model's.
        pieces: [rows]; the tokens. The memory needs room for a chunk more than a row has.
        memory: what comes before them.
        view: what they see.
        chunk: tokens of a row at a time.
        blind: whether they see no image.

    Returns:
        The rows' own keys and values with the tokens' among them, and logits after each row's last token,
        float32 [rows, vocabulary]: 0 for an empty row.
    """
    decoder = params["language_model"]["model"]
    rows = pieces.length.shape[0]
    tokens = jnp.pad(pieces.tokens, ((0, 0), (0, -pieces.capacity % chunk)))
    hidden = jnp.zeros((rows, config.text.hidden_size), decoder["norm"]["weight"].dtype)

    def unread(carry: tuple[jax.Array, Layers, jax.Array]) -> jax.Array:
        return carry[0] < pieces.length.max()

    def body(carry: tuple[jax.Array, Layers, jax.Array]) -> tuple[jax.Array, Layers, jax.Array]:
        done, own, hidden = carry
        here = replace(memory, own=own, start=memory.start + done)
        some = jax.lax.dynamic_slice(tokens, (0, done), (rows, chunk))
        out, own = text_decoder.append(decoder, config, some, here, view.at(here.positions(chunk), blind))
        last = (pieces.length - 1 - done)[:, None, None]  # [rows, 1, 1]
        ends = jnp.take_along_axis(out, jnp.clip(last, 0, chunk - 1), axis=1)[:, 0]
        hidden = jnp.where((last[:, 0] >= 0) & (last[:, 0] < chunk), ends, hidden)
        return done + chunk, own, hidden

    _, own, hidden = jax.lax.while_loop(unread, body, (jnp.int32(0), memory.own, hidden))
    return own, logits(params, hidden)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Written:
    """What was drawn for each row.

    Attributes:
        tokens: int32 [rows, capacity], padding after the last.
        length: int32 [rows], tokens of text: an end-of-sequence token is not one.
        ended: int32 [rows], one of TAG, EOS, BUDGET, UNUSED.
        state: int32 [rows], of the reader after the last token.
        log_probability: float32 [rows], of all tokens drawn together, the end-of-sequence token
            among them, as the model gives it: before temperature, top_k and top_p.
    """

    tokens: jax.Array
    length: jax.Array
    ended: jax.Array
    state: jax.Array
    log_probability: jax.Array

    @property
    def text(self) -> Pieces:
        """The tokens as pieces."""
        return Pieces(self.tokens, self.length)

    @property
    def drawn(self) -> jax.Array:
        """int32 [rows], tokens drawn."""
        return self.length + (self.ended == EOS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Limits:
    """When to stop drawing, and how to draw.

    Attributes:
        reader: uint8 [states, vocabulary], what ``readers.tabulate`` made for what ends a row; states
            from ``states`` on end it.
        budget: int32, the most tokens of a row.
        temperature: float32.
        keys: [rows], random keys; a draw's is folded from its row's and its place in the row.
        used: bool [rows], which rows to draw for at all.
    """

    reader: jax.Array
    budget: jax.Array
    temperature: jax.Array
    keys: jax.Array
    used: jax.Array


def write(
    params: Weights,
    config: MllamaConfig,
    scores: jax.Array,
    memory: Memory,
    view: View,
    limits: Limits,
    *,
    capacity: int,
    sampling: Sampling,
    blind: jax.Array | bool = False,
) -> tuple[Layers, Written]:
    """Draw tokens for rows until each has ended.

    Args:
        params: the model's, unrolled.
        config: the model's.
        scores: logits of the first token, float32 [rows, vocabulary].
        memory: what comes before it, with room for ``capacity`` tokens more.
        view: what the tokens see.
        limits: when to stop, and how to draw.
        capacity: of the result; no budget is larger.
        sampling: top_k and top_p; where its temperature is 0, every draw takes the likeliest token.
        blind: whether the rows see no image.

    Returns:
        The rows' own keys and values, and what was drawn.
    """
    decoder = params["language_model"]["model"]
    rows = scores.shape[0]
    states = limits.reader.shape[0]
    ends = jnp.array(config.text.eos_token_ids, jnp.int32)

    def settle(place: jax.Array, scores: jax.Array, so_far: Written) -> tuple[jax.Array, Written]:
        """Draw the token at ``place`` of every row that has not ended."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(limits.keys, place)
        token = draw(scores, keys, sampling, limits.temperature)
        going = so_far.ended == BUDGET
        eos = jnp.isin(token, ends)
        text_goes_on = going & ~eos
        state = jnp.where(text_goes_on, limits.reader[so_far.state, token].astype(jnp.int32), so_far.state)
        ended = jnp.where(going & eos, EOS, jnp.where(text_goes_on & (state >= states), TAG, so_far.ended))
        kept = jnp.where(text_goes_on, token, config.text.pad_token_id)
        likely = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(scores, axis=-1)
        return token, Written(
            tokens=jax.lax.dynamic_update_slice(so_far.tokens, kept[:, None], (0, place)),
            length=so_far.length + text_goes_on,
            ended=ended,
            state=state,
            log_probability=so_far.log_probability + jnp.where(going, likely, 0),
        )

    Carry = tuple[jax.Array, jax.Array, Layers, Written]

    def unfinished(carry: Carry) -> jax.Array:
        place, _, _, so_far = carry
        return (place < limits.budget) & (so_far.ended == BUDGET).any()

    def body(carry: Carry) -> Carry:
        place, token, own, so_far = carry
        here = replace(memory, own=own, start=memory.start + place - 1)
        hidden, own = text_decoder.append(decoder, config, token[:, None], here, view.at(here.positions(1), blind))
        token, so_far = settle(place, logits(params, hidden[:, 0]), so_far)
        return place + 1, token, own, so_far

    zeros = jnp.zeros(rows, jnp.int32)
    nothing = Written(
        tokens=jnp.full((rows, capacity), config.text.pad_token_id, jnp.int32),
        length=zeros,
        ended=jnp.where(limits.used, BUDGET, UNUSED),  # what a row that is still going will have ended by
        state=zeros,
        log_probability=jnp.zeros(rows, jnp.float32),
    )
    token, first = settle(jnp.int32(0), scores, nothing)
    _, _, own, written = jax.lax.while_loop(unfinished, body, (jnp.int32(1), token, memory.own, first))
    return own, written
