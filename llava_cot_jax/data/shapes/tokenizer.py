"""The tokenizer of the shapes world, and the small model that fits it.

Both come with the package, the model with trained weights: ``tests/evidence/shapes_model.py`` makes them.
"""

from transformers import PreTrainedTokenizerFast

from llava_cot_jax.data.shapes.rows import CELL, GROUND, SIDE, ShapesRows
from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
from llava_cot_jax.paths import EMBEDDED_FOLDER
from llava_cot_jax.processing.tokenizer import make_tokenizer

VOCAB_SIZE = 512
SAMPLES = 512
"""Rows of the training split that the merges are learned from: they have every word of the world."""

OTHER_WORDS = (
    "system\n\nuser\n\nassistant\n\n",
    "Response 1:\n\nResponse 2:\n\nI choose response 1. I choose response 2.",
    "Question: Which response is better? Is the response correct or incorrect?",
    *("correct", "incorrect", "0123456789"),
)
"""What the chat format and a judge say."""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer whose files are shipped. Every word of the world, with the space before it, is one token."""
    rows = ShapesRows("train", size=SAMPLES)
    turns = [turn for i in range(SAMPLES) for turn in rows.turns(i)]
    texts = [text for turn in turns for text in (turn.question, turn.answer)]
    return make_tokenizer([*texts, *OTHER_WORDS], VOCAB_SIZE)


def shapes_tokenizer() -> PreTrainedTokenizerFast:
    """The shipped tokenizer, of 512 entries, with Llama 3's pieces, special tokens and chat format."""
    return PreTrainedTokenizerFast.from_pretrained(EMBEDDED_FOLDER, local_files_only=True)


def shapes_config() -> MllamaConfig:
    """A model of 1.3 million parameters for the shapes world, with every part of the published ones.

    A patch is a cell. The cross layers are those of two super-blocks, as in the published models.
    """
    tokenizer = shapes_tokenizer()
    special = tokenizer.get_added_vocab()
    vision = VisionConfig(
        hidden_size=64,
        intermediate_size=256,
        attention_heads=4,
        num_hidden_layers=2,
        num_global_layers=1,
        image_size=SIDE,
        patch_size=CELL,
        max_num_tiles=1,
        supported_aspect_ratios=((1, 1),),
        intermediate_layers_indices=(1,),
        # An empty cell is 0 and what is in a cell is small at first: larger, they drown the positions,
        # and captions come out right hundreds of steps later.
        image_mean=tuple(value / 255 for value in GROUND),
        image_std=(1.0, 1.0, 1.0),
    )
    text = TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=240,  # with 256 the rows of an array meet in a CPU's cache: a step takes 1.4 times as long
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=(3, 8),
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tuple(special[f"<|{name}|>"] for name in ("end_of_text", "eom_id", "eot_id")),
        pad_token_id=tokenizer.pad_token_id,
    )
    return MllamaConfig(vision=vision, text=text, image_token_index=VOCAB_SIZE)
