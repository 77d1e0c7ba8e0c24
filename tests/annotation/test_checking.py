"""Checks of a reply's form and meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_cot_jax.annotation.checking import (
    Problem,
    fault_of_form,
    fault_of_verdict,
    fits_standard_answer,
    is_same_text,
    plain_conclusion,
    staged_text,
)
from llava_cot_jax.annotation.prompts import AnnotationPrompts
from llava_cot_jax.annotation.rows import TurnToAnnotate
from llava_cot_jax.stages import is_staged
from tests.annotation.stand_in_endpoint import TAGS, staged

PIECES = [*(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS), "a", " ", "\n\n"]


def is_right(pieces: list[str]) -> bool:
    """Whether pieces are four sections in order, each with a letter, and spaces alone between them: a plain reading."""
    expected = [piece for tag in TAGS for piece in (f"<{tag}>", "a", f"</{tag}>")]
    letters = [piece for piece in pieces if piece.strip()]
    joined = [piece for i, piece in enumerate(letters) if piece != "a" or letters[i - 1 : i] != ["a"]]
    return joined == expected


@given(st.data())
def test_any_change_of_a_good_answer_is_judged_as_by_a_plain_reading(data):
    pieces = [piece for tag in TAGS for piece in (f"<{tag}>", " ", "a", " ", f"</{tag}>", "\n\n")]
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(pieces) - 1))
        if data.draw(st.booleans()):
            pieces.insert(place, data.draw(st.sampled_from(PIECES)))
        else:
            del pieces[place]
    reply = "".join(pieces)
    assert (fault_of_form(reply) is None) == is_right(pieces)
    if is_right(pieces):
        assert is_staged(reply) and fault_of_form(staged_text(reply)) is None
        assert staged_text(staged_text(reply)) == staged_text(reply)


@pytest.mark.parametrize(
    ("reply", "kind", "text"),
    [
        ("I'm sorry, but I can't help with that.", Problem.MISSING, "the section <SUMMARY> is missing"),
        (staged("x") + " Hope it helps!", Problem.OUTSIDE, "there is text after </CONCLUSION>: Hope it helps!"),
        (f"```\n{staged('x')}\n```", Problem.OUTSIDE, "there is text before <SUMMARY>: ```"),
        (staged("x", CAPTION="<SUMMARY> again"), Problem.REPEATED, "the tag <SUMMARY> is there more than once"),
        (staged("\n "), Problem.EMPTY, "the section <CONCLUSION> is empty"),
        (staged("x\ud83d"), Problem.CHARACTERS, "it is half of one"),
        (staged("x <|image|>"), Problem.CHARACTERS, "it spells the control token <|image|>"),
    ],
)
def test_what_is_wrong_is_said(reply, kind, text):
    fault = fault_of_form(reply)
    assert fault is not None and fault.kind == kind and text in fault.text


def test_when_a_conclusion_is_the_same_text_and_when_it_agrees():
    letter, number = TurnToAnnotate("q?", ("B",)), TurnToAnnotate("q?", (5, "five"))
    assert plain_conclusion(staged("**B**.")) == "B."
    assert (
        is_same_text("b", letter)
        and not is_same_text("B: the dog", letter)
        and fits_standard_answer("B: the dog", letter)
    )
    assert is_same_text("5", number) and is_same_text("Five.", number) and not is_same_text("5 cm", number)
    assert fits_standard_answer("five", number) and not fits_standard_answer("six", number)


@pytest.mark.parametrize(
    ("conclusion", "answer", "is_same"),
    [
        ("C#", "C", False),
        ("C++.", "C", False),
        ("5%", 5, False),
        ("$5", 5, False),
        (".5", 5, False),
        ("-5", 5, False),
        ("(5)", 5, False),
        (" \u201cBlue\u201d! ", "blue", True),
        ("light\nblue:", "'Light blue'", True),
        ("?", "!", False),
        ("A'", "A", False),
        ("5!", 5, False),
        ("n!", "n", False),
        ('5"', "5'", False),
        ('The "Blue" one.', 'the "blue" one', True),
    ],
)
def test_only_marks_without_a_meaning_are_left_aside(conclusion, answer, is_same):
    assert is_same_text(conclusion, TurnToAnnotate("q?", (answer,))) == is_same


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("YES", None),
        ("**Yes**, both say blue.", None),
        ("no", Problem.CONCLUSION),
        ("No. One is red.", Problem.CONCLUSION),
        ("Refusal", Problem.REFUSAL),
        ("The conclusion is not the same: yes", Problem.VERDICT),
        ("yesterday", Problem.VERDICT),
        ("**Verdict:** yes", None),
        ("Verdict: no, it is red", Problem.CONCLUSION),
        ("No: yes", Problem.CONCLUSION),
        ("Verdict:", Problem.VERDICT),
        ("Yes\u2014both say blue.", None),
        ("No\u2014one is red.", Problem.CONCLUSION),
        ("Yes,both are.", None),
        ("1. yes", None),
        ("Verdict - yes", None),
        ("yes/no", Problem.VERDICT),
        ("", Problem.VERDICT),
    ],
)
def test_the_first_word_of_a_verdict_counts(reply, kind):
    fault = fault_of_verdict(reply, AnnotationPrompts.load().verdicts, "red", "blue")
    assert (fault and fault.kind) == kind
    if fault and kind == Problem.CONCLUSION:
        assert fault.text.startswith("its conclusion 'red' does not mean the same as the standard answer 'blue'")


def test_prompts_leave_braces_of_a_question_alone():
    turn = TurnToAnnotate("What is {answer} in {hint}?", ("{hint}",), "{question}")
    text = AnnotationPrompts.load().ask(turn.question, turn)
    assert "Question: What is {answer} in {hint}?\n" in text
    assert "Standard answer: {hint}\n\nHint: {question}\n" in text
