"""One process of several that answer questions with one model together, or a single one; prints its answers as JSON.

python answer_worker.py PROCESS PROCESSES PORT SCRATCH SEARCH...
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.data.shapes.tokenizer import shapes_config, shapes_tokenizer
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.sharding import make_mesh
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.retracing import Retracing
from llava_cot_jax.search.scorers import Judge, LogProbability, Verifier
from llava_cot_jax.search.sentence_beam import SentenceBeam
from llava_cot_jax.search.strategies import BestOfN, MajorityVote, StageBeam
from llava_cot_jax.search.stream import Question
from tests.search.models import PROMPTS, open_gates, scene

QUESTIONS = 8
SLOTS = 3
ALL_TOKENS: dict[str, Any] = {"top_k": None, "top_p": 1.0}
"""Settings with which no program sorts the vocabulary, which takes long to compile."""


def main() -> None:
    process, processes, port, scratch, *names = sys.argv[1:]
    is_alone = processes == "1"
    if not is_alone:
        jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
    model, processor = small_model(None if is_alone else mesh_across_processes())
    prompts = Path(scratch) / f"prompts {process} of {processes}.yaml"
    prompts.write_text(PROMPTS)

    def reasoner(strategy: Any) -> Reasoner:
        return Reasoner(model, processor, strategy, prompts)

    images, questions = map(list, zip(scene(0), (None, scene(1)[1]), strict=True))

    def answer(strategy: Any) -> list[Any]:
        """Answer one question without an image, which compiles in half the time."""
        return [shown(reasoner(strategy).answer(None, questions[0], seed=4))]

    def answer_batch(strategy: Any) -> list[Any]:
        return [shown(each) for each in reasoner(strategy).answer_batch(images, questions, seeds=[4, 5])]

    def stream() -> dict[str, Any]:
        scorers = (Verifier(), LogProbability(), Judge("token"), Verifier())
        strategy = StageBeam((3, 2, 4, 4), scorers, 1.0, (6, 5, 7, 4), **ALL_TOKENS)
        asked = [Question(scene(i)[1], None if i % 3 else scene(i)[0], seed=i) for i in range(QUESTIONS)]
        answers = reasoner(strategy).answer_stream(asked, slots=SLOTS, prompt_tokens=128, images=1, ordered=False)
        found, counter = [next(answers)], CompilationCounter()
        found += answers
        return {"answers": [(each.index, shown(each.answer)) for each in found], "compiled": counter.count}

    def generate() -> dict[str, Any]:
        generator = Generator(model, Sampling(temperature=1.0), processor)
        texts = [processor.prompt(user_turn(each, 1 - i)) for i, each in enumerate(questions)]
        inputs = processor(texts, [images[:1], []])
        tokens = generator.generate(inputs, max_new_tokens=40, seeds=[4, 5])
        counter = CompilationCounter()
        *_, last = generator.stream_completions(inputs, max_new_tokens=40, seeds=[4, 5])
        return {"tokens": tokens.tolist(), "texts": [each.text for each in last], "compiled": counter.count}

    work: dict[str, Callable[[], Any]] = {
        "stages": lambda: answer_batch(StageBeam(3, Judge("token"), 0.9, 6, **ALL_TOKENS)),
        "vote": lambda: answer(MajorityVote(4, temperature=1.2, max_new_tokens=10)),
        "sentences": lambda: answer(SentenceBeam(2, LogProbability(), 1.0, 20, **ALL_TOKENS)),
        "retracing": lambda: answer(
            Retracing(3, threshold=1.0, max_rounds=2, temperature=1.0, max_new_tokens=4, **ALL_TOKENS)
        ),
        "generator": generate,
        "stream": stream,
    }
    found = {name: work[name]() for name in names}
    try:
        reasoner(BestOfN(2, lambda images, question, stage, texts: [*map(len, texts)], max_new_tokens=4))
    except UserError as fault:
        found["refusal"] = str(fault)
    print(json.dumps(found))


def small_model(mesh: Mesh | None) -> tuple[Mllama, Processor]:
    """Return a random model with a layer of each kind, which often ends an answer."""
    config = shapes_config()
    vision = replace(
        config.vision,
        num_hidden_layers=1,
        num_global_layers=1,
        intermediate_layers_indices=(0,),
        initializer_range=0.25,
    )
    text = replace(
        config.text,
        num_hidden_layers=2,
        cross_attention_layers=(1,),
        initializer_range=0.25,
        eos_token_ids=tuple(range(0, 500, 60)),
    )
    config = replace(config, text=text, vision=vision)
    model = Mllama(config, mesh=mesh, rngs=nnx.Rngs(1))
    open_gates(model)
    return model, Processor(config, shapes_tokenizer())


def mesh_across_processes() -> Mesh:
    """Return a mesh on which heads are sharded over devices of both processes."""
    mesh = make_mesh(fsdp=2, tensor=2, devices=[jax.devices()[i] for i in (0, 2, 1, 3)])
    assert [{device.process_index for device in pair} for pair in mesh.devices[0]] == [{0, 1}, {0, 1}]
    return mesh


def shown(answer: Answer | None) -> dict[str, Any]:
    """Return what an answer says, and who won it."""
    assert answer is not None
    stages = [
        {
            "winner": stage.winner,
            "round": stage.round,
            "candidates": [(one.text, one.tokens, one.ended, one.parent) for one in stage.candidates],
        }
        for stage in answer.trace.stages
    ]
    return {"text": answer.text, "stages": stages}


if __name__ == "__main__":
    main()
