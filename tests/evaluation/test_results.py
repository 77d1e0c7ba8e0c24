"""What scored rows say together, and how it is printed."""

import io

import pytest
from rich.console import Console

from llava_cot_jax.evaluation.results import print_result, summarize


def row(identifier: str, right: bool, category: str | None, *images: str, **more) -> dict:
    took = {} if "error" in more else {"tokens": {"prompt": 10, "candidates": 20}, "flops": {"prompt": 300}}
    scored = {"right": right, "category": category, "match": "exact"}
    return {"id": identifier, "images": list(images), **scored, **took, **more}


def printed(rows: list[dict]) -> str:
    screen = io.StringIO()
    result = {"benchmark": "[mine].jsonl", "run": {"search": "Greedy()"}, **summarize(rows)}
    print_result(result, Console(file=screen, width=100, highlight=False))
    return screen.getvalue()


def test_categories_may_have_any_names():
    """Even that of the last line, and those that rich would take for a style."""
    rows = [row("a", True, "all"), row("b", False, "[bold]"), row("c", True, None)]
    accuracy = summarize(rows)["accuracy"]
    assert {name: each["questions"] for name, each in accuracy["categories"].items()} == {"all": 1, "[bold]": 1}
    assert accuracy["all"]["questions"] == 3
    text = printed(rows)
    assert text.startswith("[mine].jsonl with Greedy()\n")
    assert "[bold]" in text and text.count("│ all ") == 2 and "clustered" not in text and "no answer" not in text


def test_tokens_and_flops_are_those_of_answered_questions():
    rows = [
        row("a", True, None, "x.png"),
        row("b", True, None, "x.png", tokens={"prompt": 30, "candidates": 0, "judge": 8}),
        row("c", False, None, "y.png", error="no such picture"),
    ]
    result = summarize(rows)
    assert result["tokens_per_question"] == {"prompt": 20, "candidates": 10, "judge": 4, "total": 34}
    assert result["flops_per_question"] == {"prompt": 300, "total": 300}
    assert result["accuracy"]["all"]["unanswered"] == 1
    # The answers less 2/3 add up to 2/3 for one picture, and to -2/3 for the other.
    assert result["accuracy"]["all"]["clustered_standard_error"] == pytest.approx(0.3142697)
    text = printed(rows)
    assert "66.7%" in text and "27.2%" in text and "31.4%" in text
    assert "a question took 34 tokens, of which 10 were generated, and 300 FLOPs" in text
    assert (
        "1 of 3 questions has no answer, and counts as wrong: the rows with the key error in answers.jsonl say why"
        in text
    )


def test_nothing_is_answered():
    result = summarize([row("a", False, None, error="no such picture")])
    assert result["accuracy"]["all"]["clustered_standard_error"] is None
    assert result["tokens_per_question"] == result["flops_per_question"] == {}
    assert "took" not in printed([row("a", False, None, error="no such picture")])
