"""Answer a question about an image from a Llama-3.2-Vision checkpoint.

python -m llava_cot_jax.generate --checkpoint DIR_OR_HUB_ID --image FILE --question TEXT

Without ``--search`` the text streams as it comes; with it, the answer is searched for in one compiled call. Without
``--checkpoint`` the small model of the package answers, and without a question it is asked about pictures drawn here.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import jsonargparse
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import check_writable, write_text
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.model.checkpoint.finding import read_config, resolve_checkpoint, stated_max_new_tokens
from llava_cot_jax.model.choices import MESH_AXES, Dtype
from llava_cot_jax.model.config import Convention, MllamaConfig
from llava_cot_jax.paths import EMBEDDED, as_path
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.search.options import STRATEGIES, add_arguments, chosen
from llava_cot_jax.search.prompts import DEFAULT_FILE, JudgePrompts
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.stages import find_stages

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

    from llava_cot_jax.model.mllama import Mllama
    from llava_cot_jax.processing.processor import Processor
    from llava_cot_jax.search.preparation import Questions
    from llava_cot_jax.search.reasoner import Answer as Found
    from llava_cot_jax.search.trace import Trace

NEW_TOKENS = 2048
"""The longest answer without a search, by default."""

NOTE = (
    "No --checkpoint was given: the small model that comes with the package answers. It knows pictures of coloured "
    "shapes on a grid, such as it draws itself, and nothing else."
)


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: an argument, a file or a checkpoint that cannot be used, before anything expensive starts.
    """
    options = _parser().parse_args(argv)
    _how(options)
    if is_default := options.checkpoint is None:
        options.checkpoint = EMBEDDED
    folder = resolve_checkpoint(options.checkpoint)
    config = read_config(folder, options.convention)
    _take_stated_length(options, folder)
    questions = _questions(options)
    _check(options)

    # The rest takes longer to import than it takes to say what is wrong with what is given.
    from llava_cot_jax.processing.processor import Processor

    processor = Processor.from_pretrained(folder)

    import jax

    from llava_cot_jax.model.mllama import Mllama

    cli.keep_compilations()
    compilations = cli.CompilationCounter()
    mesh = _mesh(options.mesh, config)
    how = _how(options)
    way = _Streamed(processor, how, options) if isinstance(how, Sampling) else _Searched(processor, how, options)
    prepared = [way.prepare(asked) for asked in questions]
    if is_default:
        Console(stderr=True).print(NOTE, style="bold yellow")

    began = time.perf_counter()
    with cli.progress_bar("loading weights") as on_progress:
        model = Mllama.from_pretrained(
            folder, convention=options.convention, dtype=options.dtype, mesh=mesh, on_progress=on_progress
        )
        if options.quantize:
            model.quantize()
    loading = time.perf_counter() - began
    for asked, answer_it in zip(questions, prepared, strict=True):
        before = compilations.count
        if asked.right_answer and not options.json and not options.show_search:
            print(f"{asked.question} ({asked.image})", flush=True)
        answer = answer_it(model)
        if options.json:
            extra = {**asdict(asked), "compilations": compilations.count - before}
            answer.seconds["load"] = loading
            print(json.dumps({**extra, **asdict(answer), "device": jax.devices()[0].device_kind}), flush=True)
        elif asked.right_answer and not options.show_search:
            print(f"(the right answer: {asked.right_answer})", flush=True)
    for name in ("trace", "page"):
        if options[name]:
            print(f"wrote the {name} of the search to {options[name]}", file=sys.stderr)


def _parser() -> cli.Parser:
    parser = cli.Parser("generate", "Answer questions about images.")
    add = parser.add_argument
    add(
        "--checkpoint",
        type=str,
        help="a folder in Hugging Face form, an id on the hub, or shapes (the default): the small model that comes "
        "with the package",
    )
    add(
        "--question",
        type=str,
        nargs="+",
        help="one question, or several asked in turn; without any, pictures are drawn and asked about",
    )
    add("--image", type=str, nargs="*", help="an image for all questions, or one for each; none asks without an image")
    add(
        "--draw",
        type=int | None,
        default=None,
        help="without --question: draw this number of pictures of coloured shapes, and ask about each (default: 1)",
    )
    add("--draw-to", type=str, default="runs/pictures", help="the folder that takes the drawn pictures")
    add(
        "--max-new-tokens",
        type=int | None,
        default=None,
        help="the longest answer without a search, in tokens; default: max_new_tokens of the checkpoint's "
        f"generation_config.json where it has one, else {NEW_TOKENS}",
    )
    add("--seed", type=int, default=0, help="the seed of sampled tokens, and of drawn pictures")
    add_arguments(parser)
    add("--judge-prompts", type=str, default=str(DEFAULT_FILE), help="a file of the judge's prompts")
    add("--trace", type=str, help="write all candidates, verdicts and counts of a search to this JSON file")
    add("--page", type=str, help="write all candidates, scores and verdicts of a search to this HTML file")
    add("--show-search", action="store_true", help="print all candidates, scores and verdicts of a search")
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
    if options.search is None:
        for name in ("trace", "page", "show_search"):
            if options[name]:
                raise UserError(
                    f"--{name.replace('_', '-')} is of a search: give --search too ({', '.join(STRATEGIES)})"
                )
    if options.search is not None and options.max_new_tokens is not None:
        raise UserError("--max-new-tokens is of an answer without a search: give --budget instead")
    return how


def _take_stated_length(options: jsonargparse.Namespace, folder: Path) -> None:
    """Let the checkpoint say how long an answer, or a stage, may be, where the user does not."""
    name = "max_new_tokens" if options.search is None else "budget"
    if options[name] is None:
        options[name] = stated_max_new_tokens(folder)


def _check(options: jsonargparse.Namespace) -> None:
    """Refuse what can be refused before anything slow is imported: files to read, files to write, sizes of a mesh."""
    from llava_cot_jax.processing.images import check_image

    for image in options.image or []:
        check_image(image)
    if options.search:
        JudgePrompts.load(options.judge_prompts)
    for axis, size in vars(options.mesh).items():
        if size is not None and size < 1:
            raise UserError(f"mesh.{axis} is {size}; it must be at least 1")
    for name in ("trace", "page"):
        if options[name] is not None:
            check_writable(as_path(options[name]))


def _mesh(sizes: jsonargparse.Namespace, config: MllamaConfig) -> Mesh | None:
    from llava_cot_jax.model.sharding import check_mesh, default_mesh, make_mesh

    given = {axis: size for axis, size in vars(sizes).items() if size is not None}
    mesh = make_mesh(**given) if given else default_mesh(config)
    if mesh is not None:
        check_mesh(config, mesh)
    return mesh


@dataclass(frozen=True)
class Asked:
    """A question to answer.

    Attributes:
        question: what is asked.
        image: the path of the image that it is about, if it is about one.
        right_answer: the right answer where it is known, as it is of drawn pictures.
    """

    question: str
    image: str | None
    right_answer: str | None = None


def _questions(options: jsonargparse.Namespace) -> list[Asked]:
    """The questions that the user asks, each with its image; those about drawn pictures where there are none."""
    images: list[str] = options.image or []
    if not options.question:
        if images:
            raise UserError("give --question: what is to be answered about the image")
        from llava_cot_jax.data.shapes.drawn import draw_questions

        folder, count = options.draw_to, 1 if options.draw is None else options.draw
        drawn = draw_questions(as_path(folder), count, options.seed)
        return [Asked(each.question, str(Path(folder) / each.image.name), each.answer) for each in drawn]
    if len(images) not in (0, 1, len(options.question)):
        raise UserError(f"{len(images)} images for {len(options.question)} questions: give none, one, or one for each")
    own: list[str | None] = [*images] or [None]
    return [Asked(question, own[i % len(own)]) for i, question in enumerate(options.question)]


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
        self._done: list[tuple[Asked, Trace]] = []

    def prepare(self, asked: Asked) -> Callable[[Mllama], Answer]:
        """What answers a question; it is refused here if it cannot be."""
        prepared = self._preparation.prepare([asked.image], [asked.question], self._options.seed)
        return functools.partial(self._answer, asked, prepared)

    def _answer(self, asked: Asked, questions: Questions, model: Mllama) -> Answer:
        from llava_cot_jax.search.reasoner import answer_prepared

        options = self._options
        with contextlib.nullcontext() if options.json else cli.status("searching"):
            (found,) = cli.heard(lambda: answer_prepared(model, self._preparation, questions))
        trace, last = found.trace, found.trace.stages[-1]
        self._done.append((asked, trace))
        if not options.json:
            self._print(found, asked.right_answer)
        if options.trace:
            traces = [asdict(trace) for _, trace in self._done]
            write_text(as_path(options.trace), json.dumps(traces, indent=1, ensure_ascii=False))
        if options.page:
            self._write_page(model)
        ended = last.candidates[last.winner].ended
        return Answer(found.text, found.stages, ended, trace.tokens, trace.seconds)

    def _write_page(self, model: Mllama) -> None:
        """Write all searches so far."""
        import jax

        from llava_cot_jax.search.page import Entry, write_page

        facts = {
            "checkpoint": self._options.checkpoint,
            "convention": model.config.convention,
            "weights": f"{model.dtype}{', text in int8' if model.is_quantized else ''}",
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "date": datetime.date.today(),
            **{name: version(name) for name in ("llava_cot_jax", "jax")},
        }
        entries = [
            Entry(trace, [asked.image] if asked.image else [], asked.right_answer) for asked, trace in self._done
        ]
        write_page(as_path(self._options.page), entries, facts)

    def _print(self, found: Found, right_answer: str | None) -> None:
        if self._options.show_search:
            from llava_cot_jax.search.show import describe_search

            Console(highlight=False).print(describe_search(found.trace, right_answer))
        else:
            print(found.text if self._options.show_reasoning else found.conclusion, flush=True)


class _Streamed:
    """Questions answered without a search, each token shown as it comes."""

    def __init__(self, processor: Processor, sampling: Sampling, options: jsonargparse.Namespace) -> None:
        self._processor, self._sampling, self._options = processor, sampling, options
        self._longest = NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens

    def prepare(self, asked: Asked) -> Callable[[Mllama], Answer]:
        """What answers a question; it is refused here if it cannot be."""
        from llava_cot_jax.inference.generator import check_request

        processor, images = self._processor, [] if asked.image is None else [asked.image]
        inputs = processor([processor.prompt(user_turn(asked.question, len(images)))], [images])
        check_request(processor.config, inputs["input_ids"].shape[1], self._longest, self._options.seed)
        return functools.partial(self._answer, inputs)

    def _answer(self, inputs: dict[str, np.ndarray], model: Mllama) -> Answer:
        from llava_cot_jax.inference.generator import Generator
        from llava_cot_jax.inference.screen import Screen

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


if __name__ == "__main__":
    cli.run(main, leave=os._exit)
