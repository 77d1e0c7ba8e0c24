"""Serve a checkpoint to clients of OpenAI's API for chat completions.

llava-cot serve --checkpoint DIR_OR_HUB_ID --search stage_beam
llava-cot serve --checkpoint DIR_OR_HUB_ID --searches greedy best_of_n-8 --port 8000
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llava_cot_jax import cli
from llava_cot_jax.answering_model import AnsweringModel, add_model_options, check_mesh_sizes
from llava_cot_jax.answering_processes import add_process_options, prepare_devices, run_in_group
from llava_cot_jax.checks import check_int
from llava_cot_jax.errors import UserError
from llava_cot_jax.hosts.lifeline import Lifeline
from llava_cot_jax.hosts.process_group import ProcessGroup
from llava_cot_jax.paths import as_path
from llava_cot_jax.search.options import add_arguments, check_verifier_adapter
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.request_options import add_weight_options
from llava_cot_jax.search.strategies import Strategy
from llava_cot_jax.serving.api_errors import ApiError
from llava_cot_jax.serving.searches import SearchMenu
from llava_cot_jax.serving.sockets import is_loopback, listen, url_of

if TYPE_CHECKING:
    from llava_cot_jax.processing.processor import Processor
    from llava_cot_jax.search.request_builder import RequestBuilder
    from llava_cot_jax.serving.engine import AnsweringEngine
    from llava_cot_jax.serving.image_urls import ImageLoader
    from llava_cot_jax.serving.orders import Deliver, OrderSource

KEY = "LLAVA_COT_API_KEY"
"""Environment variable of the key that requests must have."""

_READERS = 2
"""Number of threads in which bodies and images are read."""


def main(argv: list[str] | None = None) -> None:
    """Run the command.

    Raises:
        UserError: An argument, a port or a checkpoint that cannot be used, before anything expensive starts.
    """
    run_in_group("serve", _parser(), sys.argv[1:] if argv is None else argv, _serve)


@dataclass(frozen=True)
class _Checked:
    """Arguments that can be used, as far as that is known without the model's processor."""

    options: Any
    model: AnsweringModel
    menu: SearchMenu
    searches: dict[str, Strategy]

    @property
    def strategies(self) -> list[Strategy]:
        """The searches that are compiled at the start, each once."""
        return list(dict.fromkeys([self.menu.default, *self.searches.values()]))

    def fields(self) -> dict[str, str]:
        """Return what must be the same in processes that share a model, by name."""
        own = ("hosts", "checkpoint", "adapter", "verifier_adapter", "config", "host", "port", "name", "local_images")
        return {name: str(value) for name, value in vars(self.options).items() if name not in own}


def _serve(options: Any, group: ProcessGroup, lifeline: Lifeline | None) -> None:
    """Serve until a signal.

    Args:
        options: Options of the command.
        group: Processes of the run.
        lifeline: Bond of the processes that have one model over all their devices; None where each has its own.
    """
    checked = _check(options, group)

    # This import takes longer than all checks so far.
    from llava_cot_jax.processing.processor import Processor

    with contextlib.nullcontext() if group.index else listen(options.host, options.port) as listener:
        processor = Processor.from_pretrained(checked.model.folder, checked.model.config)
        prepare_devices(group, lifeline, checked.fields, checked.model)
        new_builder = _builders(checked, processor)
        if listener is None:
            _follow(checked, new_builder)
        else:
            _listen_and_answer(checked, processor, new_builder, listener, is_shared=lifeline is not None)


def _builders(checked: _Checked, processor: Processor) -> Callable[[Strategy], RequestBuilder]:
    """Return the function that makes the builder of the requests of a search. The listed searches are checked.

    Raises:
        UserError: A search cannot be used with this checkpoint.
    """
    from llava_cot_jax.search.request_builder import RequestBuilder
    from llava_cot_jax.search.room import Room

    options = checked.options

    def new_builder(strategy: Strategy) -> RequestBuilder:
        return RequestBuilder(processor, strategy, options.judge_prompts, checked.model.stated_length)

    for strategy in checked.strategies:
        Room.at_least(new_builder(strategy), options.prompt_tokens, options.images)
    return new_builder


def _engine(
    checked: _Checked,
    new_builder: Callable[[Strategy], RequestBuilder],
    source: OrderSource,
    deliver: Deliver,
    *,
    is_shared: bool,
    is_first: bool,
) -> AnsweringEngine:
    """Load the model, compile the listed searches, and return what answers questions."""
    from PIL import Image

    from llava_cot_jax.serving.engine import AnsweringEngine, EngineSettings

    options, model = checked.options, checked.model
    settings = EngineSettings(options.slots, options.prompt_tokens, options.images, survives=not is_shared)
    engine = AnsweringEngine(model.load(model.mesh(), is_first), new_builder, settings, source, deliver)
    side = model.config.vision.image_size
    engine.warm_up(checked.strategies, Image.new("RGB", (side, side)))
    return engine


def _follow(checked: _Checked, new_builder: Callable[[Strategy], RequestBuilder]) -> None:
    """Compute what the first process answers with, until it stops, which this process leaves the signals to."""
    from llava_cot_jax.serving.shared_orders import SharedOrders

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    engine = _engine(
        checked, new_builder, SharedOrders(None), lambda number, report: None, is_shared=True, is_first=False
    )
    engine.run()


def _listen_and_answer(
    checked: _Checked,
    processor: Processor,
    new_builder: Callable[[Strategy], RequestBuilder],
    listener: socket.socket,
    *,
    is_shared: bool,
) -> None:
    """Answer requests until a signal.

    Args:
        checked: The arguments.
        processor: Processor of the checkpoint.
        new_builder: Function that makes the builder of the requests of a search.
        listener: Socket that listens.
        is_shared: Whether other processes have parts of the model.
    """
    from llava_cot_jax.serving.app import Endpoint
    from llava_cot_jax.serving.dispatcher import Dispatcher
    from llava_cot_jax.serving.orders import OrderQueue, Stop
    from llava_cot_jax.serving.server import Answering, serve_requests

    options, orders, source = checked.options, OrderQueue(), None
    if is_shared:
        from llava_cot_jax.serving.shared_orders import SharedOrders

        source = SharedOrders(orders)
    compilations = cli.CompilationCounter()
    engines: list[AnsweringEngine] = []
    dispatcher = Dispatcher(orders.give, most_answers=options.max_requests, most_searches=options.kept_searches)

    def prepare(deliver: Deliver) -> list[Strategy]:
        engine = _engine(checked, new_builder, source or orders, deliver, is_shared=is_shared, is_first=True)
        engines.append(engine)
        compilations.count = 0
        return checked.strategies

    def tell_ready() -> None:
        print(f"serving {checked.menu.name} at {url_of(listener)}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(_READERS) as readers:
        endpoint = Endpoint(
            menu=checked.menu,
            listed=tuple(checked.searches),
            processor=processor,
            loader=_image_loader(options),
            dispatcher=dispatcher,
            most_bytes=options.max_body_mb << 20,
            seed=options.seed,
            key=os.environ.get(KEY) or None,
            readers=readers,
            compilations=lambda: compilations.count,
        )
        print(f"listening at {url_of(listener)}, loading and compiling", file=sys.stderr, flush=True)
        answering = Answering(prepare, lambda: engines[0].run(), lambda: orders.give(Stop()), is_shared)
        has_ended = serve_requests(listener, endpoint.app(), dispatcher, answering, tell_ready)
    if not has_ended:  # Python cannot end in order while a thread of it compiles
        os._exit(0)


def _image_loader(options: Any) -> ImageLoader:
    from llava_cot_jax.serving.image_urls import ImageLoader

    folder = None if options.local_images is None else as_path(options.local_images)
    return ImageLoader(options.max_images, options.max_body_mb << 20, folder, options.fetch_images)


def _check(options: Any, group: ProcessGroup) -> _Checked:
    """Check the arguments before anything slow is imported.

    Raises:
        UserError: One of them cannot be used.
    """
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise UserError("serve needs starlette and uvicorn: pip install 'llava-cot-jax[serve]'")
    if group.count > 1 and options.hosts.divide == "questions":
        raise UserError(
            f"there are {group.count} processes by {group.source}, of which each would be a server of its own: give "
            "--hosts.count 1 to each, or --hosts.divide model for one model over the devices of all"
        )
    for name in ("slots", "prompt_tokens", "max_images", "max_requests", "max_body_mb", "kept_searches"):
        check_int(name, options[name])
    check_int("images", options.images, least=0)
    check_int("seed", options.seed, least=0)
    check_mesh_sizes(options)
    JudgePrompts.load(options.judge_prompts)
    if options.local_images is not None and not as_path(options.local_images).is_dir():
        raise UserError(f"--local_images {options.local_images} is no folder")
    key = os.environ.get(KEY, "")
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise UserError(f"the key in {KEY} must be of ASCII characters, without a line break or a space around it")
    may_listen = group.index or key or options.allow_unauthenticated
    if not (may_listen or is_loopback(options.host)):
        raise UserError(
            f"--host {options.host} lets others reach this server: set the environment variable {KEY} to a key that "
            "they must send, or give --allow_unauthenticated"
        )
    model = AnsweringModel.find(options)
    menu = SearchMenu(options, _name(options), options.max_candidates, options.accept_any_model)
    searches: dict[str, Strategy] = {}
    for name in options.searches:
        try:
            searches[name] = menu.strategy(name)
        except ApiError as fault:
            raise UserError(f"--searches: {fault}") from None
    if len({menu.default, *searches.values()}) > options.kept_searches:
        raise UserError("--searches has more searches than are kept: give a higher --kept_searches")
    checked = _Checked(options, model, menu, searches)
    check_verifier_adapter(options, checked.strategies)
    return checked


def _name(options: Any) -> str:
    """Return the name of the model: the last part of the checkpoint's, unless it is given."""
    return options.name or str(options.checkpoint).rstrip("/").rpartition("/")[2]


def _parser() -> cli.Parser:
    parser = cli.Parser("serve")
    _add_serving_options(parser)
    add_model_options(parser)
    add_arguments(parser)
    add_weight_options(parser)
    add_process_options(parser)
    return parser


def _add_serving_options(parser: cli.Parser) -> None:
    add = parser.add_argument
    add(
        "--host",
        type=str,
        default="127.0.0.1",
        help="Address to listen at. One that other machines reach, such as 0.0.0.0, needs a key in the environment "
        f"variable {KEY}.",
    )
    add("--port", type=int, default=8000, help="Port to listen at. 0 takes one that is free.")
    add("--name", type=str, help="Name of the model for clients. By default, the last part of the checkpoint's.")
    add(
        "--searches",
        type=str,
        nargs="*",
        default=[],
        help="Searches that are compiled at the start besides that of --search, such as greedy, stage_beam-4 or "
        "best_of_n-8. A request chooses one by the name of the model, as in NAME:stage_beam-4. Any other is compiled "
        "when it is first asked for.",
    )
    add("--slots", type=int, default=8, help="Number of questions of a search that are answered at a time.")
    add(
        "--prompt_tokens",
        type=int,
        default=256,
        help="Number of tokens of a prompt that there is room for at least. A longer one compiles the search anew.",
    )
    add(
        "--images",
        type=int,
        default=1,
        help="Number of images of a question that there is room for at least. More compile the search anew.",
    )
    add("--seed", type=int, default=0, help="Seed of a request that has none.")
    _add_bounds(parser.add_argument_group("Bounds").add_argument)
    _add_permissions(parser.add_argument_group("Permissions").add_argument)


def _add_bounds(add: Any) -> None:
    add(
        "--max_requests",
        type=int,
        default=128,
        help="Largest number of answers that are waited for. One more request is answered with 429 and Retry-After.",
    )
    add("--max_body_mb", type=int, default=64, help="Largest number of MiB of a request, and of its images.")
    add("--max_images", type=int, default=8, help="Largest number of images of a request.")
    add("--max_candidates", type=int, default=16, help="Largest number of candidates that a request may choose.")
    add(
        "--kept_searches",
        type=int,
        default=4,
        help="Number of searches whose caches are kept on the devices. Another one takes the place of the one that was "
        "used longest ago, unless all are being used.",
    )


def _add_permissions(add: Any) -> None:
    add(
        "--accept_any_model",
        type=bool,
        default=False,
        help="Answer requests to other names of models too, such as that of a judge, by the search of --search.",
    )
    add(
        "--allow_unauthenticated",
        type=bool,
        default=False,
        help="Let other machines ask without a key.",
    )
    add("--local_images", type=str, help="Folder whose files requests may name by file:// URLs.")
    add("--fetch_images", type=bool, default=False, help="Fetch the images that requests name by http:// URLs.")


if __name__ == "__main__":
    cli.run(main, leave=os._exit, command="serve")
