"""Answer a question about an image from a Llama-3.2-Vision checkpoint.

python -m llava_cot_jax.generate --checkpoint DIR_OR_HUB_ID --image FILE --question TEXT

Without ``--search`` the text streams as it comes; with it, the answer is searched for in one compiled call.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, get_args

import jax
import jsonargparse
import numpy as np
from rich.console import Console

from llava_cot_jax import cli
from llava_cot_jax.data.processor import Processor, user_turn
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint import read_config, resolve_checkpoint
from llava_cot_jax.model.config import Convention, MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.sharding import MESH_AXES, Mesh, check_mesh, default_mesh, make_mesh
from llava_cot_jax.paths import access
from llava_cot_jax.search.generator import Generator, check_request
from llava_cot_jax.search.preparation import Preparation
from llava_cot_jax.search.prompts import DEFAULT_FILE
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.sampling import Sampling
from llava_cot_jax.search.strategies import (
    BestOfN,
    Greedy,
    Judge,
    LogProbability,
    MajorityVote,
    Sample,
    StageBeam,
    Strategy,
)
from llava_cot_jax.search.trace import Trace
from llava_cot_jax.stages import find_stages, may_be_staged

STRATEGIES: dict[str, type[Any]] = {
    "greedy": Greedy,
    "sample": Sample,
    "majority_vote": MajorityVote,
    "best_of_n": BestOfN,
    "stage_beam": StageBeam,
}

NEW_TOKENS = 2048
"""The longest answer without a search, by default."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: an argument, a file or a checkpoint that cannot be used, before anything expensive starts.
    """
    options = _parser().parse_args(argv)
    cli.keep_compilations()
    compilations = cli.CompilationCounter()
    strategy = _strategy(options)
    sampling = None if strategy else Sampling(options.temperature or 0.0, options.top_k, options.top_p or 1.0)
    folder = resolve_checkpoint(options.checkpoint)
    config = read_config(folder, options.convention)
    mesh = _mesh(options.mesh, config)
    processor = Processor.from_pretrained(folder)
    questions = _pair(options.question, options.image or [])
    inputs = [_inputs(processor, question, image) for question, image in questions]
    longest = NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens
    for (question, image), arrays in zip(questions, inputs, strict=True):
        if strategy:
            Preparation(processor, strategy, options.judge_prompts).request([image], [question], [options.seed])
        else:
            check_request(config, arrays["input_ids"].shape[1], longest, options.seed)
    if options.trace:
        _check_writable(Path(options.trace))

    began = time.perf_counter()
    with cli.progress_bar("loading weights") as on_progress:
        model = Mllama.from_pretrained(
            folder, convention=options.convention, dtype=options.dtype, mesh=mesh, on_progress=on_progress
        )
        if options.quantize:
            model.quantize()
    loading = time.perf_counter() - began
    reasoner = Reasoner(model, processor, strategy, options.judge_prompts) if strategy else None
    generator = Generator(model, sampling)
    traces: list[Trace] = []
    for (question, image), arrays in zip(questions, inputs, strict=True):
        before = compilations.count
        if reasoner:
            answer, trace = _search(reasoner, question, image, options)
            traces.append(trace)
        else:
            with contextlib.nullcontext() if options.json else Screen(options.show_reasoning) as screen:
                answer = _answer(generator, processor, arrays, longest, options.seed, screen)
        if options.json:
            extra = {"question": question, "image": image, "compilations": compilations.count - before}
            answer.seconds["load"] = loading
            print(json.dumps({**extra, **asdict(answer), "device": jax.devices()[0].device_kind}), flush=True)
        if options.trace:
            _write_traces(Path(options.trace), traces)


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
    add(
        "--temperature",
        type=float | tuple[float, ...] | None,
        default=None,
        help="0 takes the likeliest token; default: 0, and in a search 0.6, as LLaVA-CoT samples",
    )
    add("--top-k", type=int | None, default=None, help="sample among so many of the likeliest tokens; in a search 50")
    add(
        "--top-p",
        type=float | None,
        default=None,
        help="sample among the likeliest of this probability; in a search 0.9",
    )
    add("--seed", type=int, default=0, help="of the draws")
    add("--search", choices=list(STRATEGIES), help="search for the answer; stage_beam is LLaVA-CoT's method")
    add(
        "--candidates",
        type=int | tuple[int, ...] | None,
        default=None,
        help="of a search; like --temperature and --budget, of stage_beam one number or a list of one for each stage",
    )
    add(
        "--budget",
        type=int | tuple[int, ...] | None,
        default=None,
        help="of a search: the longest answer in tokens, or the longest stage",
    )
    add(
        "--judge",
        choices=["token", "rationale", "log_probability"],
        help="what chooses among candidates: the model by the probability of its verdict (default) or by a written "
        "reason, or the candidates' own mean log-probability",
    )
    add("--judge-prompts", type=str, default=str(DEFAULT_FILE), help="a file of the judge's prompts")
    add("--trace", type=str, help="write all candidates, verdicts and counts of a search to this JSON file")
    add(
        "--convention",
        choices=get_args(Convention),
        help="what the weights were trained with",
    )
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; default: the checkpoint's own")
    add(
        "--quantize", choices=["int8"], help="decode with the text layers' weights in int8: half the memory of bfloat16"
    )
    for axis in MESH_AXES:
        add(f"--mesh.{axis}", type=int | None, default=None, help="devices on this axis; default: all devices are used")
    add("--show-reasoning", action="store_true", help="show all four stages as they come")
    add("--json", action="store_true", help="print one JSON object a question instead of text")
    return parser


def _strategy(options: jsonargparse.Namespace) -> Strategy | None:
    """What ``--search`` and the arguments that go with it come to."""
    given = {
        name: options[name]
        for name in ("candidates", "budget", "judge", "temperature", "top_k", "top_p")
        if options[name] is not None
    }
    if options.search is None:
        searching = {"candidates", "budget", "judge"} & given.keys() or {"trace"} & {k for k, v in options.items() if v}
        if searching:
            raise UserError(f"--{min(searching)} is of a search: give --search too ({', '.join(STRATEGIES)})")
        if isinstance(options.temperature, tuple):
            raise UserError("several temperatures are those of stages: give --search stage_beam too")
        return None
    if options.max_new_tokens is not None:
        raise UserError("--max-new-tokens is of an answer without a search: give --budget instead")
    made = STRATEGIES[options.search]
    if judge := given.pop("judge", None):
        given["scorer"] = LogProbability() if judge == "log_probability" else Judge(judge)
    for name, value in given.items():
        if name not in {field.name for field in dataclasses.fields(made)}:
            spoken = "judge" if name == "scorer" else name.replace("_", "-")
            raise UserError(f"--{spoken} has no meaning for --search {options.search}")
        if isinstance(value, tuple) and made is not StageBeam:
            raise UserError(f"--{name} takes one value, except for --search stage_beam")
    strategy: Strategy = made(**given)
    strategy.plan()  # refuses what cannot be used
    return strategy


def _mesh(sizes: jsonargparse.Namespace, config: MllamaConfig) -> Mesh | None:
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


def _inputs(processor: Processor, question: str, image: str | None) -> dict[str, np.ndarray]:
    images = [] if image is None else [image]
    return processor([processor.prompt(user_turn(question, len(images)))], [images])


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


def _search(
    reasoner: Reasoner, question: str, image: str | None, options: jsonargparse.Namespace
) -> tuple[Answer, Trace]:
    """Search for an answer; a person is shown it."""
    with contextlib.nullcontext() if options.json else cli.status("searching"):
        found = cli.heard(lambda: reasoner.answer(image, question, seed=options.seed))
    if not options.json:
        print(found.text if options.show_reasoning else found.conclusion, flush=True)
    trace, last = found.trace, found.trace.stages[-1]
    ended = last.candidates[last.winner].ended
    return Answer(found.text, found.stages, ended, trace.tokens, trace.seconds), trace


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


def _answer(
    generator: Generator,
    processor: Processor,
    inputs: dict[str, np.ndarray],
    max_new_tokens: int,
    seed: int,
    screen: "Screen | None",
) -> Answer:
    began, first, text = time.perf_counter(), None, ""
    ids: list[int] = []
    for tokens in generator.stream(inputs, max_new_tokens=max_new_tokens, seeds=seed):
        first = first or time.perf_counter() - began
        ids += tokens[0].tolist()
        text = processor.decode(ids)
        if screen:
            screen.show(text.rstrip("\ufffd"))  # a character whose last bytes are still to come
    if screen:
        screen.finish(text)
    ended = "eos" if ids[-1] in generator.config.text.eos_token_ids else "max_new_tokens"
    counts = {"prompt": int(inputs["attention_mask"].sum()), "new": len(ids)}
    seconds = {"first_token": first or 0.0, "total": time.perf_counter() - began}
    return Answer(text, find_stages(text), ended, counts, seconds)


class Screen:
    """Shows a person an answer as it grows: the stage being worked on, then the conclusion.

    With ``show_reasoning``, and where the answer has no stages, the whole text.
    """

    def __init__(self, show_reasoning: bool) -> None:
        self._whole = show_reasoning
        self._shown = ""
        self._stage = ""
        self._console = Console(stderr=True)
        self._status = self._console.status("reading the question")

    def __enter__(self) -> Self:
        if not self._whole:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()  # gives the terminal its cursor back, after Ctrl-C too

    def show(self, text: str) -> None:
        """The answer so far."""
        stages = find_stages(text)
        if self._whole or not (stages or may_be_staged(text)):
            self._print(text)
        elif stages:
            stage, body = list(stages.items())[-1]
            if stage == "CONCLUSION":
                self._print(_without_partial_tag(body))
            elif stage != self._stage:
                self._stage = stage
                self._tell(f"writing the {stage.lower()}")

    def finish(self, text: str) -> None:
        """The whole answer: what of it was held back is shown."""
        conclusion = find_stages(text).get("CONCLUSION")
        self._print(text if self._whole or conclusion is None else conclusion)
        print(flush=True)

    def _tell(self, what: str) -> None:
        self._status.update(what)
        if not self._console.is_terminal:
            print(what, file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        self._status.stop()
        print(text.removeprefix(self._shown), end="", flush=True)
        self._shown = text


def _without_partial_tag(body: str) -> str:
    """``body`` without the beginning of a closing tag at its end."""
    start = body.rfind("<")
    return body[:start].rstrip() if start >= 0 and "</CONCLUSION>".startswith(body[start:]) else body


if __name__ == "__main__":
    cli.run(main, leave=os._exit)
