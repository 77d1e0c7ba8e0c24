"""Llama-3.2-Vision in JAX, and LLaVA-CoT's staged answers from it."""

from llava_cot_jax.data.processor import Processor, user_turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.sharding import make_mesh
from llava_cot_jax.search.decode import Generator
from llava_cot_jax.search.sampling import Sampling
from llava_cot_jax.stages import find_stages

__all__ = [
    "Generator",
    "Mllama",
    "MllamaConfig",
    "Processor",
    "Sampling",
    "TextConfig",
    "UserError",
    "VisionConfig",
    "find_stages",
    "make_mesh",
    "user_turn",
]
