"""Models to search with: random ones that write anything, and one trained on the shapes world."""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from PIL import Image

from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.data.shapes.tokenizer import shapes_config, shapes_tokenizer
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.processor import Processor

PROMPTS = """
pair:
  text: "{criterion} Question: {question}{earlier} Response 1: {first} Response 2: {second} Which?"
  stem: "I choose response "
  verdicts: ["1", "2"]
  readings: [e, a]
criteria: {REASONING: "Sound?", whole: "Right?", other: "Good?"}
earlier: " Seen: "
shows: {REASONING: [CAPTION], CONCLUSION: [CAPTION, REASONING]}
check:
  stages: [REASONING]
  text: "Check. Question: {question}{earlier} Steps: {first} Right?"
  readings: [o, i]
"""
"""File of prompts for models that were not trained to judge: letters that they often write count as verdicts."""


def random_model(seed: int = 0, *, convention="meta", eos: tuple[int, ...] | None = None) -> tuple[Mllama, Processor]:
    """Return a random model with three text layers and one tile, in which the tokens ``eos`` end an answer."""
    config = shapes_config()
    text = replace(config.text, num_hidden_layers=3, cross_attention_layers=(1,), initializer_range=0.25)
    if eos is not None:
        text = replace(text, eos_token_ids=eos)
    vision = replace(config.vision, num_hidden_layers=2, initializer_range=0.25)
    config = replace(config, text=text, vision=vision, convention=convention)
    model = Mllama(config, rngs=nnx.Rngs(seed))
    open_gates(model)
    return model, Processor(config, shapes_tokenizer())


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
    return row.images[0], row.turns[0].question.replace("<image>", "").strip()
