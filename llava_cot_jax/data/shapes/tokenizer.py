"""Tokenizer of the shapes world, and configuration of its small model.

Both come with the package, the model with trained weights; ``tests/evidence/shapes_model.py`` makes the files.
"""

from transformers import PreTrainedTokenizerFast

from llava_cot_jax.data.shapes.rows import CELL, GROUND, SIDE, ShapesRows
from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER
from llava_cot_jax.processing.tokenizer import make_tokenizer

VOCAB_SIZE = 512
SAMPLES = 512
"""Number of training rows that the merges are learned from. They contain every word of the shapes world."""

OTHER_WORDS = (
    "system\n\nuser\n\nassistant\n\n",
    "Response 1:\n\nResponse 2:\n\nI choose response 1. I choose response 2.",
    "Question: Which response is better? Is the response correct or incorrect?",
    *("correct", "incorrect", "0123456789"),
)
"""Texts of the chat format and of a judge."""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer of the package. Every word of the shapes world, with the space before it, is one token."""
    rows = ShapesRows("train", size=SAMPLES)
    turns = [turn for i in range(SAMPLES) for turn in rows.turns(i)]
    texts = [text for turn in turns for text in (turn.question, turn.answer)]
    return make_tokenizer([*texts, *OTHER_WORDS], VOCAB_SIZE)


def shapes_tokenizer() -> PreTrainedTokenizerFast:
    """Load the package's tokenizer of 512 entries, with Llama 3's pre-tokenizer, special tokens and chat format."""
    return PreTrainedTokenizerFast.from_pretrained(BUNDLED_MODEL_FOLDER, local_files_only=True)


def shapes_config() -> MllamaConfig:
    """Return the configuration of a model of 1.3 million parameters, with every part of the published models.

    A patch is a cell. The cross-attention layers belong to two super-blocks, laid out as in the published models.
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
        # An empty cell is 0, and other pixel values are small at first: larger values would hide the position
        # embeddings, and captions would be learned hundreds of steps later.
        image_mean=tuple(value / 255 for value in GROUND),
        image_std=(1.0, 1.0, 1.0),
    )
    text = TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=240,  # 256 would cause conflicts in a CPU's cache, and a step would take 1.4 times as long
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
