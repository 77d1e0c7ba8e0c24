"""Models to search with: random ones that write anything, and one trained on the shapes world."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.data.shapes.tokenizer import shapes_config, shapes_tokenizer
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.scorers import Judge
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.stage_format import STAGES

PROMPTS = """
pair:
  text: "{criterion} Question: {question}{earlier} Response 1: {first} Response 2: {second} Which?"
  stem: "I choose response "
  verdicts: ["1", "2"]
  readings: [e, a]
criteria: {REASONING: "Sound?", whole: "Right?", sentence: "Next?", other: "Good?"}
earlier: " Seen: "
shows: {REASONING: [CAPTION], CONCLUSION: [CAPTION, REASONING]}
check:
  stages: [REASONING]
  text: "Check. Question: {question}{earlier} Steps: {first} Right?"
  readings: [o, i]
probe:
  questions: {REASONING: "Sound?", whole: "Right?", other: "Good?"}
  stem: "Answer:"
  answers: [" yes", " no"]
"""
"""File of prompts for models that were not trained to judge: letters that they often write count as verdicts."""

TRAINED_BEAM = StageBeam(3, Judge("token"), temperature=1.3, max_new_tokens=(14, 30, 50, 9))
"""A search by the trained model. Tests that need no settings of their own share its program, which compiles slowly."""


def random_model(
    seed: int = 0, *, convention="meta", eos: tuple[int, ...] | None = None, layers: int = 3, dtype=jnp.float32
) -> tuple[Mllama, Processor]:
    """Return a random model with one tile, in which the tokens ``eos`` end an answer.

    The last but one of its text layers is of cross-attention.
    """
    config = shapes_config()
    text = replace(config.text, num_hidden_layers=layers, cross_attention_layers=(layers - 2,), initializer_range=0.25)
    if eos is not None:
        text = replace(text, eos_token_ids=eos)
    vision = replace(config.vision, num_hidden_layers=2, initializer_range=0.25)
    config = replace(config, text=text, vision=vision, convention=convention)
    arrays = random_arrays(replace(config, convention="meta"), seed, dtype)
    return Mllama.from_arrays(config, dict(arrays), layout="unrolled"), Processor(config, shapes_tokenizer())


@functools.cache
def random_arrays(config: MllamaConfig, seed: int, dtype) -> dict[str, jax.Array]:
    """Return the parameters of a random model by their paths, which are drawn once in a process."""
    model = Mllama(config, rngs=nnx.Rngs(seed), dtype=dtype)
    open_gates(model)
    return flatten_dict(model.params, sep=".")


def tagged_processor() -> Processor:
    """Return the processor of the small model, whose tokenizer has all eight tags as special tokens of their own."""
    tokenizer = shapes_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tags = [f"<{slash}{stage}>" for stage in STAGES for slash in ("", "/")]
    fillers = [token for token in content["added_tokens"] if "<|reserved_special_token_" in token["content"]]
    for token, tag in zip(fillers[-len(tags) :], tags, strict=True):
        token["content"] = tag
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "chat_template")}
    backend = Tokenizer.from_str(json.dumps(content))
    return Processor(shapes_config(), PreTrainedTokenizerFast(tokenizer_object=backend, **names))


def open_gates(model: Mllama) -> None:
    """Open the gates of cross-attention, so that the images count as much as the text does."""
    for layer in model.language_model.model.layers.values():
        for gate in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
            if gate in layer:
                layer[gate].set_value(jnp.ones_like(layer[gate].get_value()))


def trained_model() -> tuple[Mllama, Processor]:
    """Return the trained model that comes with the package."""
    return Mllama.from_pretrained("shapes"), Processor.from_pretrained("shapes")


def scene(index: int) -> tuple[Image.Image, str]:
    """Return a held-out picture, and the question about it."""
    row = ShapesRows("test")[index]
    (image,) = row.images
    assert isinstance(image, Image.Image)
    return image, row.turns[0].question.replace("<image>", "").strip()
