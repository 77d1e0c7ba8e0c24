"""A small random Llama-3.2-Vision checkpoint with every file that a published one has, and a picture to ask about."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import save
from transformers import PreTrainedTokenizerFast

from llava_cot_jax.model.checkpoint.auxiliary_files import write_auxiliary_files
from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
from llava_cot_jax.model.parameters import GATE, parameters
from llava_cot_jax.processing.tokenizer import make_tokenizer

VOCAB_SIZE = 640
STD = 0.1
"""Standard deviation of the weights: at the usual 0.02 so small a model hardly reacts to its input."""

CORPUS = (
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    "system\n\nuser\n\nassistant\n\n",
    "<SUMMARY> I will find the two shapes that the question names and compare their colours. </SUMMARY>",
    "<SUMMARY> I will count the red shapes in the picture, one row after the other. </SUMMARY>",
    "<CAPTION> The picture shows a red square, a blue circle and a green triangle on a white ground. </CAPTION>",
    "<CAPTION> There are three shapes: a yellow circle on the left, and two green squares on the right. </CAPTION>",
    "<REASONING> The square is red. The circle is blue. Red and blue are different colours. </REASONING>",
    "<REASONING> In the first row there are two red shapes, in the second one, so there are three. </REASONING>",
    "<CONCLUSION> No, the two shapes have different colours. </CONCLUSION>",
    "<CONCLUSION> There are three red shapes. </CONCLUSION>",
    "<CONCLUSION> The answer is B. </CONCLUSION>",
    "What does the picture show? Describe the image in one sentence.",
    "How many shapes are in the picture? How many of them are red?",
    "What is the colour of the circle? What colour is the shape on the left of the triangle?",
    "Is the square above the circle? Is the triangle larger than the square? Answer yes or no.",
    "Which of the following is right? A. the red square B. the blue circle C. the green triangle D. none",
    "The red square is left of the blue circle. The blue circle is right of the red square.",
    "The green triangle is below the yellow circle. The yellow circle is above the green triangle.",
    "Response 1 is better than response 2, since it describes what the picture shows. I choose response 1.",
    "Response 2 is better than response 1, since its reasoning is right step by step. I choose response 2.",
    "First, look at the image. Then, read the question. After that, think step by step. Finally, give the answer.",
    "Let us count: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10. The sum of 12 and 30 is 42, and 42 - 30 = 12.",
    "I don't see any other shape, so that's all there is in the picture; it isn't large.",
    "The first shape is on the left, the second one is in the middle, and the third one is on the right.",
    "There is no text in this image, and there are no people, only shapes of different colours and sizes.",
)
"""What the tokenizer learns its merges from."""


def demo_config(tokenizer: PreTrainedTokenizerFast) -> MllamaConfig:
    """A model of about two million parameters with every part of the published ones."""
    special = tokenizer.get_added_vocab()
    vision = VisionConfig(
        hidden_size=64,
        intermediate_size=256,
        attention_heads=4,
        num_hidden_layers=6,
        num_global_layers=2,
        image_size=56,
        intermediate_layers_indices=(1, 3, 4),
        initializer_range=STD,
    )
    text = TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=(3, 8),
        initializer_range=STD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tuple(special[f"<|{name}|>"] for name in ("end_of_text", "eom_id", "eot_id")),
        pad_token_id=tokenizer.pad_token_id,
    )
    return MllamaConfig(vision=vision, text=text, image_token_index=VOCAB_SIZE)


def random_weights(config: MllamaConfig, seed: int) -> dict[str, np.ndarray]:
    """Every published tensor of the model, float32, drawn from ``seed``: by numpy, so alike on every device."""
    draw = np.random.default_rng(seed)
    constants = {"zeros": 0.0, "ones": 1.0, "gate": GATE}
    return {
        name: np.full(p.shape, constants[p.initializer], np.float32)
        if p.initializer in constants
        else np.float32(p.std) * draw.standard_normal(p.shape, np.float32)
        for name, p in parameters(config, "unrolled").items()
    }


def draw_picture() -> Image.Image:
    """A red square, a blue circle and a green triangle, RGB 160 x 112."""
    picture = Image.new("RGB", (160, 112), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((10, 36, 50, 76), fill="red")
    draw.ellipse((60, 36, 100, 76), fill="blue")
    draw.polygon(((110, 76), (150, 76), (130, 36)), fill="green")
    return picture


def write_demo(folder: Path, seed: int = 0) -> None:
    """Write the checkpoint and ``picture.png`` into ``folder``. The same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(CORPUS, VOCAB_SIZE)
    config = demo_config(tokenizer)
    (folder / "model.safetensors").write_bytes(save(random_weights(config, seed), metadata={"format": "pt"}))
    write_auxiliary_files(folder, config, tokenizer, "float32")
    draw_picture().save(folder / "picture.png")
