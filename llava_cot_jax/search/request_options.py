"""Options that say what is asked and what is shown, and that do not change how much is computed for a question."""

from typing import Any, get_args

from llava_cot_jax.model.convention import Convention
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS


def add_request_options(parser: Any) -> None:
    """Add these options to a parser of ``jsonargparse``: ``generate`` reads them, and ``plan`` ignores them."""
    add_weight_options(parser)
    _add_question_options(parser.add_argument_group("Questions and pictures").add_argument)
    _add_output_options(parser.add_argument_group("Output").add_argument)


def add_weight_options(parser: Any) -> None:
    """Add the options of what a checkpoint's weights compute, and of what a judge is asked."""
    add = parser.add_argument
    add("--convention", choices=get_args(Convention), help="Convention that the weights were trained with.")
    add(
        "--adapter",
        type=str,
        help="LoRA adapter in the form of the PEFT library to merge into the weights: its folder, or its id on the "
        "hub. One that was trained in transformers 5 needs --convention transformers_5.",
    )
    add(
        "--verifier_adapter",
        type=str,
        help="LoRA adapter for --judge verifier, which a training run with lora.tokens probe has made: its folder, or "
        "its id on the hub. Answers are sampled without it.",
    )
    default_prompts = str(DEFAULT_JUDGE_PROMPTS)
    add("--judge_prompts", type=str, default=default_prompts, help="YAML file with the prompts of the judge.")


def _add_question_options(add: Any) -> None:
    add(
        "--question",
        type=str,
        nargs="+",
        help="One question, or several that are asked in turn; - reads one from standard input. Without any, pictures "
        "are drawn and asked about.",
    )
    add(
        "--messages",
        type=str,
        help="JSON file with a conversation in place of a question, or - for standard input: a list of messages as in "
        'transformers, {"role": ..., "content": ...}, of which the last is the user\'s. A content is a text, or a list '
        'of {"type": "text", "text": ...} and {"type": "image", "url": ...}; images without a source there are those '
        "of --image, in order.",
    )
    add(
        "--image",
        type=str,
        nargs="*",
        help="Images of one question; or, for several questions, one image for all, or one for each. An image is a "
        "file, a file:// or data: URL, or - for standard input. Without any, the questions are asked without an image.",
    )
    add(
        "--draw",
        type=int | None,
        default=None,
        help="Number of pictures of coloured shapes to draw and ask about, without --question. By default, 1.",
    )
    add("--draw_to", type=str, default="runs/pictures", help="Folder that takes the drawn pictures.")
    add("--seed", type=int, default=0, help="Seed of sampled tokens and of drawn pictures.")


def _add_output_options(add: Any) -> None:
    add("--trace", type=str, help="JSON file that takes all candidates, verdicts and counts of a search.")
    add(
        "--threshold_to",
        type=str,
        help="JSON file that takes the threshold for --search retracing that the answers to these questions give: the "
        "mean score of the reasonings of first rounds, and 0.2533 standard deviations more. --threshold reads it.",
    )
    add("--page", type=str, help="HTML file that shows all candidates, scores and verdicts of a search.")
    add(
        "--live",
        type=bool,
        default=False,
        help="Show a search on the terminal while it runs: its stages, and the candidates as they are written, scored "
        "and chosen. The view goes once there is an answer. Where standard error is no terminal, it is lines, two for "
        "each stage.",
    )
    add("--show_search", type=bool, default=False, help="Print all candidates, scores and verdicts of a search.")
    add("--show_reasoning", type=bool, default=False, help="Print the whole answer, not only the conclusion.")
    add("--json", type=bool, default=False, help="Print one JSON object for each question instead of text.")
