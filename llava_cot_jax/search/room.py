"""Room that a slot has for a question: the shapes that the programs of a stream are compiled for."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.typing import ArrayLike

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import bucket
from llava_cot_jax.inference.ragged_tokens import RaggedTokens
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.search.program import SearchInputs
from llava_cot_jax.search.request_builder import RequestBuilder, Requests
from llava_cot_jax.search.strategies import SearchSpec


@dataclass(frozen=True)
class Room:
    """Largest sizes of a question, and the search that fits the model's context with all of them.

    Attributes:
        prompt: Tokens of a prompt, a bucket.
        question: Tokens of the question as the judge is told it, a bucket.
        header: Tokens of the judge's chat header.
        images: Images of a question.
        spec: Static part of the search.
    """

    prompt: int
    question: int
    header: int
    images: int
    spec: SearchSpec

    @classmethod
    def of(cls, requests: Requests) -> "Room":
        """Return the room that requests have, with the search that they have."""
        inputs = requests.inputs
        pixels = inputs.model_inputs.get("pixel_values")
        return cls(
            prompt=inputs.model_inputs["input_ids"].shape[1],
            question=inputs.question.capacity,
            header=inputs.chat_headers.capacity,
            images=0 if pixels is None else pixels.shape[1],
            spec=requests.spec,
        )

    @classmethod
    def at_least(cls, builder: RequestBuilder, prompt_tokens: int, images: int) -> "Room":
        """Return room for prompts of ``prompt_tokens`` tokens and for ``images`` images.

        Raises:
            UserError: The search may exceed the model's context after such a prompt.
        """
        size, header = bucket(prompt_tokens), builder.chat_headers([images]).capacity
        return cls(size, size, header, images, builder.fitting_spec(prompt_tokens, prompt_tokens, header))

    def holds(self, other: "Room") -> bool:
        """Whether questions that need ``other`` fit in."""
        sizes = (self.prompt, self.question, self.header, self.images)
        needed = (other.prompt, other.question, other.header, other.images)
        lengths = zip(self.spec.max_new_tokens, other.spec.max_new_tokens, strict=True)
        return all(a >= b for a, b in zip(sizes, needed, strict=True)) and all(a <= b for a, b in lengths)

    def grown(self, other: "Room", builder: RequestBuilder) -> "Room":
        """Return room for what either has room for.

        Default lengths are shrunk to what the context leaves after the longest prompt of the bucket, so that they are
        shrunk no more for another question of the bucket; where nothing is left then, to what ``other`` is searched
        with.
        """
        prompt, question = max(self.prompt, other.prompt), max(self.question, other.question)
        header, images = max(self.header, other.header), max(self.images, other.images)
        specs = [self.spec, other.spec]
        with contextlib.suppress(UserError):
            specs.append(builder.fitting_spec(prompt, min(prompt, question), header))
        return Room(prompt, question, header, images, min(specs, key=lambda spec: spec.max_new_tokens))


def put_in_room(requests: Requests, room: Room, config: MllamaConfig) -> Requests:
    """Return requests with their arrays padded to the shapes of ``room``, and with its search."""
    inputs = requests.inputs
    padded = SearchInputs(
        model_inputs=_pad_model_inputs(inputs.model_inputs, room, config),
        lengths=inputs.lengths,
        seeds=inputs.seeds,
        question=_pad_tokens(inputs.question, room.question),
        chat_headers=_pad_tokens(inputs.chat_headers, room.header),
    )
    return replace(requests, inputs=padded, spec=room.spec)


def _pad_tokens(tokens: RaggedTokens, capacity: int) -> RaggedTokens:
    return RaggedTokens(_pad_axis(tokens.tokens, -1, capacity), tokens.lengths)


def _pad_model_inputs(given: Mapping[str, jax.Array], room: Room, config: MllamaConfig) -> dict[str, jax.Array]:
    """Pad tokens, and add images without pixels as ``images.batch_images`` does."""
    ids = given["input_ids"]
    arrays = {"input_ids": _pad_axis(ids, 1, room.prompt, config.text.pad_token_id)}
    if not room.images:
        return arrays
    questions, vision = len(ids), config.vision
    tiles, side = vision.max_num_tiles, vision.image_size
    without_images: dict[str, jax.Array | np.ndarray] = {
        "pixel_values": np.zeros((questions, 0, tiles, vision.num_channels, side, side), np.uint8),
        "aspect_ratio_ids": np.zeros((questions, 0), np.int32),
        "aspect_ratio_mask": np.zeros((questions, 0, tiles), np.int32),
        "cross_attention_mask": np.zeros((*ids.shape, 0, tiles), np.uint8),
    }
    images: dict[str, jax.Array | np.ndarray] = {**without_images, **given}
    no_image = np.arange(tiles) == 0  # the image processor marks the first tile of a missing image
    for name, value in (("pixel_values", 0), ("aspect_ratio_ids", 0), ("aspect_ratio_mask", no_image)):
        arrays[name] = _pad_axis(images[name], 1, room.images, value)
    seen = _pad_axis(images["cross_attention_mask"], 1, room.prompt)
    return arrays | {"cross_attention_mask": _pad_axis(seen, 2, room.images)}


def _pad_axis(x: jax.Array | np.ndarray, axis: int, size: int, value: ArrayLike = 0) -> jax.Array:
    """Return an array that is padded at the end of an axis, which is done on the host, where nothing is compiled."""
    if x.shape[axis] == size:
        return jax.device_put(x)
    shape = list(x.shape)
    shape[axis] = size - x.shape[axis]
    return jax.device_put(np.concatenate([np.asarray(x), np.broadcast_to(value, shape).astype(x.dtype)], axis=axis))
