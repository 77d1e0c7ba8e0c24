"""Llama-3.2-Vision in JAX, and LLaVA-CoT's staged answers from it."""

from llava_cot_jax.data.processor import Processor, user_turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.sharding import make_mesh
from llava_cot_jax.search.generator import Generator
from llava_cot_jax.search.reasoner import Answer, Reasoner
from llava_cot_jax.search.sampling import Sampling
from llava_cot_jax.search.strategies import BestOfN, Greedy, Judge, LogProbability, MajorityVote, Sample, StageBeam
from llava_cot_jax.stages import find_stages

__all__ = [
    "Answer",
    "BestOfN",
    "Generator",
    "Greedy",
    "Judge",
    "LogProbability",
    "MajorityVote",
    "Mllama",
    "MllamaConfig",
    "Processor",
    "Reasoner",
    "Sample",
    "Sampling",
    "StageBeam",
    "TextConfig",
    "UserError",
    "VisionConfig",
    "find_stages",
    "make_mesh",
    "user_turn",
]
