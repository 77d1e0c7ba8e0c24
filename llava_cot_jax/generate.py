"""Answer a question about an image from a Llama-3.2-Vision checkpoint.

python -m llava_cot_jax.generate --checkpoint DIR_OR_HUB_ID --image FILE --question TEXT

Without ``--search`` the text streams as it comes; with it, the answer is searched for in one compiled call.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import jsonargparse

from llava_cot_jax import cli
from llava_cot_jax.data.messages import user_turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.choices import MESH_AXES, Dtype
from llava_cot_jax.model.config import Convention, MllamaConfig
from llava_cot_jax.model.finding import read_config, resolve_checkpoint
from llava_cot_jax.paths import access
from llava_cot_jax.search.options import STRATEGIES, add_arguments, chosen
from llava_cot_jax.search.prompts import DEFAULT_FILE, JudgePrompts
from llava_cot_jax.search.strategies import Sampling, Strategy
from llava_cot_jax.stages import find_stages

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

    from llava_cot_jax.data.processor import Processor
    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.search.preparation import Questions
    from llava_cot_jax.search.trace import Trace

NEW_TOKENS = 2048
"""The longest answer without a search, by default."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: an argument, a file or a checkpoint that cannot be used, before anything expensive starts.
    """
    options = _parser().parse_args(argv)
    how = _how(options)
    folder = resolve_checkpoint(options.checkpoint)
    config = read_config(folder, options.convention)
    questions = _pair(options.question, options.image or [])
    _check_files(options)

    # The rest takes longer to import than it takes to say what is wrong with what is given.
    from llava_cot_jax.data.processor import Processor

    processor = Processor.from_pretrained(folder)

    import jax

    from llava_cot_jax.model.mllama import Mllama

    cli.keep_compilations()
    compilations = cli.CompilationCounter()
    mesh = _mesh(options.mesh, config)
    way = _Streamed(processor, how, options) if isinstance(how, Sampling) else _Searched(processor, how, options)
    asked = [way.prepare(question, image) for question, image in questions]

    began = time.perf_counter()
    with cli.progress_bar("loading weights") as on_progress:
        model = Mllama.from_pretrained(
            folder, convention=options.convention, dtype=options.dtype, mesh=mesh, on_progress=on_progress
        )
        if options.quantize:
            model.quantize()
    loading = time.perf_counter() - began
    for (question, image), ask in zip(questions, asked, strict=True):
        before = compilations.count
        answer = ask(model)
        if options.json:
            extra = {"question": question, "image": image, "compilations": compilations.count - before}
            answer.seconds["load"] = loading
            print(json.dumps({**extra, **asdict(answer), "device": jax.devices()[0].device_kind}), flush=True)


def _parser() -> cli.Parser:
    parser = cli.Parser("generate", "Answer questions about images.")
    add = parser.add_argument
    add("--checkpoint", type=str, required=True, help="a folder in Hugging Face form, or an id on the hub")
    add("--question", type=str, nargs="+", required=True, help="one question, or several asked in turn")
    add("--image", type=str, nargs="*", help="an image for all questions, or one for each; none asks without an image")
    add(
        "--max-new-tokens",
        type=int | None,
        default=None,
        help=f"the longest answer without a search, in tokens; default: {NEW_TOKENS}",
    )
    add("--seed", type=int, default=0, help="of the draws")
    add_arguments(parser)
    add("--judge-prompts", type=str, default=str(DEFAULT_FILE), help="a file of the judge's prompts")
    add("--trace", type=str, help="write all candidates, verdicts and counts of a search to this JSON file")
    add(
        "--convention",
        choices=get_args(Convention),
        help="what the weights were trained with",
    )
    add("--dtype", choices=get_args(Dtype), help="of the weights; default: the checkpoint's own")
    add(
        "--quantize", choices=["int8"], help="decode with the text layers' weights in int8: half the memory of bfloat16"
    )
    for axis in MESH_AXES:
        add(f"--mesh.{axis}", type=int | None, default=None, help="devices on this axis; default: all devices are used")
    add("--show-reasoning", action="store_true", help="show all four stages as they come")
    add("--json", action="store_true", help="print one JSON object a question instead of text")
    return parser


def _how(options: jsonargparse.Namespace) -> Strategy | Sampling:
    """A search, or how tokens are drawn without one."""
    how = chosen(options)
    if options.search is None and options.trace:
        raise UserError(f"--trace is of a search: give --search too ({', '.join(STRATEGIES)})")
    if options.search is not None and options.max_new_tokens is not None:
        raise UserError("--max-new-tokens is of an answer without a search: give --budget instead")
    return how


def _check_files(options: jsonargparse.Namespace) -> None:
    """Whether what is to be read is there, and what is to be written can be: before anything slow is imported."""
    from llava_cot_jax.data.images import check_image

    for image in options.image or []:
        check_image(image)
    if options.search:
        JudgePrompts.load(options.judge_prompts)
    if options.trace:
        _check_writable(Path(options.trace))


def _mesh(sizes: jsonargparse.Namespace, config: MllamaConfig) -> Mesh | None:
    from llava_cot_jax.model.sharding import check_mesh, default_mesh, make_mesh

    given = {axis: size for axis, size in vars(sizes).items() if size is not None}
    mesh = make_mesh(**given) if given else default_mesh(config)
    if mesh is not None:
        check_mesh(config, mesh)
    return mesh


def _pair(questions: list[str], images: list[str]) -> list[tuple[str, str | None]]:
    """Each question with its image."""
    if len(images) not in (0, 1, len(questions)):
        raise UserError(f"{len(images)} images for {len(questions)} questions: give none, one, or one for each")
    own: list[str | None] = [*images] or [None]
    return [(question, own[i % len(own)]) for i, question in enumerate(questions)]


@dataclass
class Answer:
    """What came of a question.

    Attributes:
        text: the whole answer.
        stages: the body of each stage in it, by name.
        ended: "eos", or "max_new_tokens" where the answer was cut off; of a search, what ended its last stage.
        tokens: how many, by what they were: in the prompt, new, or the parts of a search.
        seconds: likewise: until the first token and until the last from the question on, or the parts of a search.
    """

    text: str
    stages: dict[str, str]
    ended: str
    tokens: dict[str, int]
    seconds: dict[str, float]


class _Searched:
    """Questions answered by a search."""

    def __init__(self, processor: Processor, strategy: Strategy, options: jsonargparse.Namespace) -> None:
        from llava_cot_jax.search.preparation import Preparation

        self._preparation = Preparation(processor, strategy, options.judge_prompts)
        self._options = options
        self._traces: list[Trace] = []

    def prepare(self, question: str, image: str | None) -> Callable[[Mllama], Answer]:
        """What answers a question; it is refused here if it cannot be."""
        return functools.partial(self._answer, self._preparation.prepare([image], [question], self._options.seed))

    def _answer(self, questions: Questions, model: Mllama) -> Answer:
        from llava_cot_jax.search.reasoner import answer_prepared

        options = self._options
        with contextlib.nullcontext() if options.json else cli.status("searching"):
            (found,) = cli.heard(lambda: answer_prepared(model, self._preparation, questions))
        if not options.json:
            print(found.text if options.show_reasoning else found.conclusion, flush=True)
        trace, last = found.trace, found.trace.stages[-1]
        self._traces.append(trace)
        if options.trace:
            _write_traces(Path(options.trace), self._traces)
        ended = last.candidates[last.winner].ended
        return Answer(found.text, found.stages, ended, trace.tokens, trace.seconds)


class _Streamed:
    """Questions answered without a search, each token shown as it comes."""

    def __init__(self, processor: Processor, sampling: Sampling, options: jsonargparse.Namespace) -> None:
        self._processor, self._sampling, self._options = processor, sampling, options
        self._longest = NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens

    def prepare(self, question: str, image: str | None) -> Callable[[Mllama], Answer]:
        """What answers a question; it is refused here if it cannot be."""
        from llava_cot_jax.search.generator import check_request

        processor, images = self._processor, [] if image is None else [image]
        inputs = processor([processor.prompt(user_turn(question, len(images)))], [images])
        check_request(processor.config, inputs["input_ids"].shape[1], self._longest, self._options.seed)
        return functools.partial(self._answer, inputs)

    def _answer(self, inputs: dict[str, np.ndarray], model: Mllama) -> Answer:
        from llava_cot_jax.screen import Screen
        from llava_cot_jax.search.generator import Generator

        began, first, text = time.perf_counter(), None, ""
        ids: list[int] = []
        stream = Generator(model, self._sampling).stream(inputs, max_new_tokens=self._longest, seeds=self._options.seed)
        with contextlib.nullcontext() if self._options.json else Screen(self._options.show_reasoning) as screen:
            for tokens in stream:
                first = first or time.perf_counter() - began
                ids += tokens[0].tolist()
                text = self._processor.decode(ids)
                if screen:
                    screen.show(text.rstrip("\ufffd"))  # a character whose last bytes are still to come
            if screen:
                screen.finish(text)
        ended = "eos" if ids[-1] in model.config.text.eos_token_ids else "max_new_tokens"
        counts = {"prompt": int(inputs["attention_mask"].sum()), "new": len(ids)}
        seconds = {"first_token": first or 0.0, "total": time.perf_counter() - began}
        return Answer(text, find_stages(text), ended, counts, seconds)


def _check_writable(path: Path) -> None:
    with access(path):
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"{path} cannot be written: name a file in a folder that exists")


def _write_traces(path: Path, traces: Sequence[Trace]) -> None:
    """All traces so far, beside the file and then in its place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with access(path):
        beside.write_text(
            json.dumps([asdict(trace) for trace in traces], indent=1, ensure_ascii=False), encoding="utf-8"
        )
        beside.replace(path)


if __name__ == "__main__":
    cli.run(main, leave=os._exit)
