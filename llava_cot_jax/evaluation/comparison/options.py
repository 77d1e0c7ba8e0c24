"""Options by which ``evaluate`` compares methods, or an evaluation with another one."""

from typing import Any

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.plotting import check_plots


def add_comparison_options(parser: Any) -> None:
    """Add the options of this part to a parser of ``jsonargparse``."""
    add = parser.add_argument_group("Comparisons").add_argument
    add(
        "--compare",
        type=str,
        help="Methods to compare on the same questions and seeds, with commas between them, instead of --search. Each "
        "is NAME, NAME:N or NAME:N/SCORER: a name of --search, the number of candidates, and a name of --judge, as in "
        "greedy,majority_vote:4,best_of_n:8/verifier,stage_beam:4. best_of_n:N/oracle takes a right answer where one "
        "of the N is right. The other options of the search are for all methods that have them.",
    )
    add(
        "--against",
        type=str,
        help="File answers.jsonl of another evaluation, with which this one is compared on the questions of both.",
    )


def check_comparison_options(options: Any) -> None:
    """Check the options that stand beside ``--compare`` and ``--against``.

    Raises:
        UserError: One of them has no meaning with another option, or no plot can be drawn.
    """
    if options.compare is None:
        return
    for name in ("search", "against"):
        if options[name] is not None:
            raise UserError(f"--{name} has no meaning with --compare: leave one of them out")
    check_plots("--compare")
