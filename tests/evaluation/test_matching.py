"""What is scored of an answer, and when it is right: tables of texts, with what is expected written by hand."""

import re

import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.matching import (
    RightAnswer,
    find_number,
    find_option,
    find_yes_no,
    form_of,
    scored_text,
    without_marks,
)
from llava_cot_jax.stage_format import StageFormat

COLOURS = {"A": "red", "B": "green", "C": "blue", "D": "yellow"}

STAGED = (
    "<SUMMARY>which colour</SUMMARY>\n\n<CAPTION>a red square beside a green star</CAPTION>\n\n"
    "<REASONING>A is red and B is green</REASONING>\n\n<CONCLUSION>**A**</CONCLUSION>"
)

OPTIONS = {
    "A": "A",
    "A.": "A",
    "(A)": "A",
    "**A**": "A",
    "A: red": "A",
    "The answer is A": "A",
    r"\boxed{B}": "B",
    "red": "A",
    "A red square": "A",
    "RED.": "A",
    "It is clearly the yellow one.": "D",
    "A or B": None,
    "a": None,
    "It is red, not green": None,
    "B, because A is wrong": None,
    "<CONCLUSION>A</CONCLUSION>": None,
    STAGED: None,
    "A it is, as far as anyone can see": None,
    "The colour of the square, which stands alone, is red": None,
    "Z": None,
    "Z, not red": None,
    "E": None,
    "": None,
}
"""The examples of VLMEvalKit's rules and some of their limits, with the letters that they match."""


@pytest.mark.parametrize("text", OPTIONS)
def test_the_option_of_a_text(text):
    assert find_option(text, "ABCD", COLOURS) == OPTIONS[text]


def test_options_without_texts_have_letters_alone():
    assert find_option("red", "ABCD") is None
    assert find_option("The answer is C.", "ABCD") == "C"
    assert RightAnswer(("F",), "option").accepts("It must be F")
    assert not RightAnswer(("B",), "option").accepts("It must be F")
    assert RightAnswer(("B", "C"), "option", COLOURS).accepts("blue")


YES_NO = {
    "Yes": "yes",
    "no.": "no",
    "**Yes**": "yes",
    "Yes, it is.": "yes",
    "I know nothing of it": None,
    "Yes, there is no doubt": None,
    "maybe": None,
}


@pytest.mark.parametrize("text", YES_NO)
def test_yes_or_no(text):
    assert find_yes_no(text) == YES_NO[text]


NUMBERS = {
    "5": "5",
    "5.": "5",
    "-5": "-5",
    "\u22125": "-5",
    "+5": "5",
    "x=-5": "-5",
    "5 cm": "5",
    "5cm": "5",
    "$5": "5",
    "14%": "14",
    "1,000": "1000",
    "1,234,567.5 people": "1234567.5",
    "1\u202f000": "1000",
    "14.0": "14",
    ".5": "0.5",
    "1e3": "1000",
    "The answer is 12, so 12": "12",
    "3,5": None,
    "1,00": None,
    "1,000,00": None,
    "1.2.3": None,
    "3 of 4": None,
    "2-3": None,
    "3/4": None,
    "H2O": None,
    "two": None,
    "1e99999": None,
    "1e99999999999999999999": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_number_of_a_text(text):
    found = find_number(text)
    assert found == (None if NUMBERS[text] is None else type(found)(NUMBERS[text]))


@pytest.mark.parametrize(
    ("answers", "tolerance", "text", "is_right"),
    [
        ((100,), 0.05, "105", True),
        ((100,), 0.05, "95 kg", True),
        ((100,), 0.05, "105.01", False),
        ((100,), 0.0, "100.0", True),
        ((100,), 0.0, "100.1", False),
        ((0.1,), 0.0, "0.10", True),
        (("-1,000 m",), 0.1, "-900", True),
        ((0,), 0.5, "0.001", False),
        ((0,), 0.5, "0", True),
        ((3, 4), 0.0, "4", True),
        ((1e22,), 0.0, "10000000000000000000000", True),
    ],
)
def test_numbers_within_a_tolerance(answers, tolerance, text, is_right):
    assert RightAnswer(answers, "number", tolerance=tolerance).accepts(text) is is_right


@pytest.mark.parametrize(
    ("answers", "text", "is_right"),
    [
        (("Red Square",), "red  square.", True),
        (("red",), "a red", False),
        (("red", "crimson"), "Crimson!", True),
        ((2,), "2", True),
        (("...",), "...", True),
    ],
)
def test_the_same_text(answers, text, is_right):
    assert RightAnswer(answers).accepts(text) is is_right


def test_a_function_of_the_users_own():
    def ends_alike(conclusion, right):
        return conclusion.endswith(right.answers[0])

    right = RightAnswer(("square",), ends_alike)
    assert right.accepts("red square") and not right.accepts("square red")
    assert right.match_name == "ends_alike"


@pytest.mark.parametrize(
    ("answers", "options", "form"),
    [
        (["A"], None, "option"),
        (["F"], None, "exact"),
        (["A", "two"], None, "exact"),
        (["F"], {"F": "x"}, "option"),
        (["yes"], None, "yes_no"),
        (["No", "no"], None, "yes_no"),
        ([5], None, "number"),
        ([-0.5, "1,000"], None, "number"),
        (["5 cm"], None, "exact"),
        (["two"], None, "exact"),
    ],
)
def test_the_form_of_a_right_answer_decides(answers, options, form):
    assert form_of(answers, options) == form


SCORED = {
    STAGED: "A",
    "<CONCLUSION> yes </CONCLUSION>": "yes",
    "<SUMMARY> a </SUMMARY> <CONCLUSION> </CONCLUSION> The answer is B": "The answer is B",
    "<SUMMARY> a </SUMMARY>\n\nThe answer is B": "The answer is B",
    "<SUMMARY> a </SUMMARY>": "a",
    "<REASONING> it is red": "it is red",
    "The answer is __B__": "The answer is B",
    "<CONCLUSION> </CONCLUSION>": "",
    "": "",
}


@pytest.mark.parametrize("text", SCORED)
def test_what_is_scored(text):
    assert scored_text(text) == SCORED[text]


def test_what_is_scored_in_other_formats():
    other = StageFormat.tagged(["think", "answer"])
    assert scored_text("<think> 2 + 2 </think> <answer> `4` </answer>", other) == "4"
    assert scored_text("in several turns", other, conclusion="**5**") == "5"
    headed = StageFormat.load("mulberry")
    assert scored_text("### Rationales:\nx\n### The final answer is: *B*", headed) == "B"


EMPHASIS = {
    "**Yes**, it is": "Yes, it is",
    "***A***": "A",
    "**the *first* one**": "the first one",
    "`4`": "4",
    "**Answer:** _B_": "Answer: B",
    "2*3*4": "2*3*4",
    "snake_case_name": "snake_case_name",
    "5 * 3 * 2": "5 * 3 * 2",
    "* a point": "* a point",
    "**": "**",
}


@pytest.mark.parametrize("text", EMPHASIS)
def test_emphasis_goes_and_words_stay(text):
    assert without_marks(text) == EMPHASIS[text]
    assert re.findall(r"\w+", text.replace("_", " ")) == re.findall(r"\w+", EMPHASIS[text].replace("_", " "))


@pytest.mark.parametrize("right", [("A",), ("yes",), ("5",), ("a cat",)])
def test_no_answer_is_right_where_there_is_none(right):
    """Whatever the options are called."""
    form = form_of(right)
    options = {"A": "unanswered", "B": "red"} if form == "option" else {}
    assert not RightAnswer(right, form, options).accepts(scored_text("<CONCLUSION> ** </CONCLUSION>".replace("**", "")))


@pytest.mark.parametrize(
    ("right", "text", "is_right"),
    [
        (5, "-$5", False),
        (5, "\u2212$5", False),
        (5, "it is \u20135", False),
        (-5, "-$5", True),
        (-5, "\u20135 degrees", True),
        (5, "2\u20135", False),
        (5, "5\u00b2", False),
        (10, "10^3", False),
        (10, "10\u207b\u00b3", False),
        (0, "0x1F", False),
        (1, "1_000", False),
        ("-5%", "5%", False),
        ("-5%", "-5%", True),
        ("-5 \u00b0C", "5 \u00b0C", False),
        ("\u22125 \u00b0C", "-5 \u00b0C", True),
        ("<5 mm", ">5 mm", False),
    ],
)
def test_signs_and_powers_count(right, text, is_right):
    assert RightAnswer((right,), form_of([right])).accepts(text) is is_right


def test_a_right_staged_answer_is_right():
    """Its text as it stands matches no option."""
    right = RightAnswer(("A",), "option", COLOURS)
    assert right.accepts(scored_text(STAGED)) and not right.accepts(STAGED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), "exact"), "there is no right answer"),
        (((" ",), "exact"), "the right answer is empty"),
        (((float("nan"),), "number"), "the right answer is nan; it must be a finite number"),
        ((("5",), "fuzzy"), "match is 'fuzzy'; it must be one of exact, option, yes_no, number"),
        ((("F",), "option", COLOURS), r"the right answer 'F' is the letter of no option \(A, B, C, D\)"),
        ((("red",), "option"), r"the right answer 'red' is the letter of no option \(A to Z\)"),
        ((("maybe",), "yes_no"), "the right answer 'maybe' is neither yes nor no"),
        ((("two",), "number"), "the right answer 'two' is not one number"),
        ((("A",), "option", {"A": " "}), "option A is empty"),
        ((("A",), "option", {"a": "red"}), "an option is called 'a'; its name is a letter from A to Z"),
        ((("A",), "option", {"A": 3}), "option A is 3; it must be a text"),
        ((("5",), "number", {}, -1), "tolerance is -1; it must not be negative"),
    ],
)
def test_right_answers_that_cannot_be_used(arguments, message):
    with pytest.raises(UserError, match=message):
        RightAnswer(*arguments)
