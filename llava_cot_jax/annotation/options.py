"""Options of the command that makes training data, and their checks."""

from typing import Any, Literal

from llava_cot_jax import cli
from llava_cot_jax.annotation.budget import Prices
from llava_cot_jax.annotation.endpoint import DEFAULT_KEY_VARIABLE
from llava_cot_jax.annotation.prompts import DEFAULT_ANNOTATION_PROMPTS
from llava_cot_jax.answering_model import add_model_options
from llava_cot_jax.checks import check_int, check_number
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.choices import MESH_AXES
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS
from llava_cot_jax.search.request_options import add_weight_options

SELF = "self"
"""Name of the model by which this project's own is meant."""

_OF_ENDPOINT = {
    "base_url": None,
    "key_variable": DEFAULT_KEY_VARIABLE,
    "prompts": str(DEFAULT_ANNOTATION_PROMPTS),
    "length_parameter": "max_completion_tokens",
    "max_side": 1120,
    "requests_in_flight": 16,
    "requests_per_minute": None,
    "timeout": 300.0,
    "max_retries": 6,
    "max_requests": None,
    "max_cost": None,
    "price.input": None,
    "price.output": None,
}
"""Options that have no meaning with ``--model self``, and their defaults."""

_OF_SELF = {
    **dict.fromkeys(("checkpoint", "adapter", "verifier_adapter", "convention", "dtype", "quantize"), None),
    **{f"mesh.{axis}": None for axis in MESH_AXES},
    "judge_prompts": str(DEFAULT_JUDGE_PROMPTS),
    "num_candidates": 8,
    "slots": 8,
    "seed": 0,
}
"""Options that have a meaning only with ``--model self``, and their defaults."""


def check_annotation_options(options: Any) -> None:
    """Check the options that stand for themselves.

    Raises:
        UserError: One of them is out of range, or has no meaning with the model.
    """
    is_self = options.model == SELF
    for name, default in (_OF_ENDPOINT if is_self else _OF_SELF).items():
        if options[name] != default:
            raise UserError(f"--{name} has {'no meaning' if is_self else 'a meaning only'} with --model {SELF}")
    for name in ("tries", "max_new_tokens", "max_side", "requests_in_flight", "num_candidates", "slots"):
        if options[name] is not None:
            check_int(name, options[name])
    for name in ("max_retries", "max_requests", "seed"):
        if options[name] is not None:
            check_int(name, options[name], least=0)
    for name in ("temperature", "timeout", "requests_per_minute", "max_cost", "price.input", "price.output"):
        if (value := options[name]) is None:
            continue
        check_number(name, value)
        if value < 0 or (not value and name in ("timeout", "requests_per_minute")):
            raise UserError(f"{name} is {value:g}; it must {'not be negative' if value < 0 else 'be more than 0'}")


def read_prices(options: Any) -> Prices | None:
    """Return the prices that the options give, if any.

    Raises:
        UserError: One of the two is missing, or a cost is bounded without them.
    """
    given = [options["price.input"], options["price.output"]]
    if None not in given:
        return Prices(*given)
    if given != [None, None] or options.max_cost is not None:
        raise UserError("a cost needs --price.input and --price.output, the prices of a million tokens")
    return None


def annotation_parser() -> cli.Parser:
    """Return the parser of the command."""
    parser = cli.Parser("annotate")
    add = parser.add_argument
    add(
        "--input",
        type=str,
        required=True,
        help="JSONL file of questions. A row has an id, image or images, question and answer, and optionally a hint; "
        "or questions, answers and hints, lists of the same length, for several turns about the same images.",
    )
    add(
        "--images",
        type=str,
        required=True,
        help="Images, read in place, as prepare reads them: a folder, a .zip, or one part of a split zip. The paths in "
        "the rows cannot leave it.",
    )
    add(
        "--output",
        type=str,
        required=True,
        help="JSONL file that takes the annotated rows, as prepare --annotations reads them. Beside it, "
        "NAME.rejected.jsonl takes the rejected turns, and NAME.journal.jsonl each reply as it comes. The same command "
        "goes on after an interruption, and asks for no reply twice.",
    )
    add(
        "--model",
        type=str,
        required=True,
        help=f'Name of the model at the endpoint; or "{SELF}", by which --checkpoint samples candidates itself, of '
        "which those that agree with the standard answer are kept.",
    )
    add(
        "--tries",
        type=int,
        default=2,
        help="Largest number of answers that are asked for, or of times that candidates are sampled, in a turn.",
    )
    add(
        "--temperature",
        type=float | None,
        default=None,
        help=f"Temperature of sampling. By default, the endpoint's own, and 0.6 with --model {SELF}.",
    )
    add(
        "--max_new_tokens",
        type=int | None,
        default=None,
        help=f"Largest number of tokens of an answer. By default, 2048; with --model {SELF}, what generate takes.",
    )
    _add_endpoint_options(parser)
    _add_self_options(parser)
    return parser


def _add_endpoint_options(parser: cli.Parser) -> None:
    add = parser.add_argument_group("Endpoint").add_argument
    add(
        "--base_url",
        type=str | None,
        default=None,
        help="URL of an endpoint that is compatible with OpenAI's, such as http://localhost:8000/v1. By default, that "
        "of OPENAI_BASE_URL, or OpenAI's.",
    )
    add(
        "--key_variable",
        type=str,
        default=DEFAULT_KEY_VARIABLE,
        help="Environment variable that holds the key. The key itself is never shown or written.",
    )
    add(
        "--prompts", type=str, default=str(DEFAULT_ANNOTATION_PROMPTS), help="YAML file with the words of the requests."
    )
    add(
        "--length_parameter",
        type=Literal["max_completion_tokens", "max_tokens"],
        default="max_completion_tokens",
        help="Name by which the endpoint takes --max_new_tokens. Some know max_tokens alone.",
    )
    add(
        "--max_side",
        type=int,
        default=1120,
        help="Longest side in pixels of an image that is sent; larger ones are shrunk. The default is the longest that "
        "Llama-3.2-Vision sees.",
    )
    add("--requests_in_flight", type=int, default=16, help="Largest number of requests at a time.")
    add(
        "--requests_per_minute",
        type=float | None,
        default=None,
        help="Largest number of requests in a minute. By default, any.",
    )
    add("--timeout", type=float, default=300.0, help="Seconds after which a reply that has not come is given up.")
    add(
        "--max_retries",
        type=int,
        default=6,
        help="Number of times that a request that failed is sent again, each time later, or when the endpoint says.",
    )
    add(
        "--max_requests",
        type=int | None,
        default=None,
        help="Largest number of requests that are sent, with those of earlier runs for this output. By default, any.",
    )
    add(
        "--max_cost",
        type=float | None,
        default=None,
        help="Largest cost, with that of earlier runs for this output, at the prices of --price.input and "
        "--price.output. By default, any.",
    )
    add("--price.input", type=float | None, default=None, help="Price of a million tokens that are read.")
    add("--price.output", type=float | None, default=None, help="Price of a million tokens that are written.")


def _add_self_options(parser: cli.Parser) -> None:
    add_model_options(parser)
    add_weight_options(parser)
    add = parser.add_argument_group(f"Sampling with --model {SELF}").add_argument
    add("--num_candidates", type=int, default=8, help="Number of candidates that are sampled at a time.")
    add("--slots", type=int, default=8, help="Number of questions that are answered at a time.")
    add("--seed", type=int, default=0, help="Seed of sampled tokens, from which each question has one of its own.")
