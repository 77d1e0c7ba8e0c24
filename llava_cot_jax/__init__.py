"""Llama-3.2-Vision in JAX, with LLaVA-CoT's staged reasoning.

Names are imported when they are first used, so that ``import llava_cot_jax`` alone does not import jax.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llava_cot_jax.interruption import prepare_process

if TYPE_CHECKING:
    __version__: str
    from llava_cot_jax.errors import UserError
    from llava_cot_jax.inference.completions import Completion
    from llava_cot_jax.inference.generator import Generator
    from llava_cot_jax.inference.settings import Sampling
    from llava_cot_jax.model.config import MllamaConfig, TextConfig, VisionConfig
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.model.sharding import make_mesh
    from llava_cot_jax.processing.messages import user_turn
    from llava_cot_jax.processing.processor import Processor
    from llava_cot_jax.search.answers import Answer
    from llava_cot_jax.search.reasoner import Reasoner
    from llava_cot_jax.search.retracing import Retracing
    from llava_cot_jax.search.scorers import Judge, LogProbability, Verifier
    from llava_cot_jax.search.sentence_beam import SentenceBeam
    from llava_cot_jax.search.snapshots import SearchSnapshot
    from llava_cot_jax.search.strategies import (
        BestOfN,
        Greedy,
        MajorityVote,
        Sample,
        StageBeam,
        WeightedVote,
    )
    from llava_cot_jax.search.stream import AnswerStream, Question, StreamedAnswer
    from llava_cot_jax.stage_format import StageFormat
    from llava_cot_jax.stages import find_stages
    from llava_cot_jax.training.loss import causal_lm_loss

prepare_process()  # before anything slow is imported

__all__ = [
    "Answer",
    "AnswerStream",
    "BestOfN",
    "Completion",
    "Generator",
    "Greedy",
    "Judge",
    "LogProbability",
    "MajorityVote",
    "Mllama",
    "MllamaConfig",
    "Processor",
    "Question",
    "Reasoner",
    "Retracing",
    "Sample",
    "Sampling",
    "SearchSnapshot",
    "SentenceBeam",
    "StageBeam",
    "StageFormat",
    "StreamedAnswer",
    "TextConfig",
    "UserError",
    "Verifier",
    "VisionConfig",
    "WeightedVote",
    "causal_lm_loss",
    "find_stages",
    "make_mesh",
    "user_turn",
]

_MODULES = {
    "processing.messages": ("user_turn",),
    "processing.processor": ("Processor",),
    "errors": ("UserError",),
    "model.config": ("MllamaConfig", "TextConfig", "VisionConfig"),
    "model.mllama": ("Mllama",),
    "model.sharding": ("make_mesh",),
    "inference.completions": ("Completion",),
    "inference.generator": ("Generator",),
    "inference.settings": ("Sampling",),
    "search.answers": ("Answer",),
    "search.reasoner": ("Reasoner",),
    "search.retracing": ("Retracing",),
    "search.scorers": ("Judge", "LogProbability", "Verifier"),
    "search.sentence_beam": ("SentenceBeam",),
    "search.snapshots": ("SearchSnapshot",),
    "search.strategies": (
        "BestOfN",
        "Greedy",
        "MajorityVote",
        "Sample",
        "StageBeam",
        "WeightedVote",
    ),
    "search.stream": ("AnswerStream", "Question", "StreamedAnswer"),
    "stage_format": ("StageFormat",),
    "stages": ("find_stages",),
    "training.loss": ("causal_lm_loss",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

# Nothing here needs torch. Without it, transformers would advise to install it at every start.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _read_version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def _read_version() -> str:
    """Return the version of the installed package, or "unknown" where only its folder is on the path."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
