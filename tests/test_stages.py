"""Finding the stages in an answer."""

import pytest

from llava_cot_jax.stages import (
    find_conclusion,
    find_stages,
    is_staged,
    locate_stages,
    may_be_staged,
    normalize_answer,
)

WHOLE = (
    "<SUMMARY> Count. </SUMMARY>\n\n<CAPTION> Two circles. </CAPTION>\n\n"
    "<REASONING> One and one. </REASONING>\n\n<CONCLUSION> 2 </CONCLUSION>"
)
BODIES = {"SUMMARY": "Count.", "CAPTION": "Two circles.", "REASONING": "One and one.", "CONCLUSION": "2"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (WHOLE, BODIES),
        ("", {}),
        ("It is a cat.", {}),
        ("<SUMMARY> Cou", {"SUMMARY": "Cou"}),
        ("<SUMMARY></SUMMARY>", {"SUMMARY": ""}),
        ("<SUMMARY> a <CAPTION> b </CAPTION>", {"SUMMARY": "a", "CAPTION": "b"}),
        ("<CONCLUSION> 3 </CONCLUSION>", {"CONCLUSION": "3"}),
        ("<CAPTION> c </CAPTION> <SUMMARY> s </SUMMARY>", {"SUMMARY": "s"}),
        ("<CONCLUSION> a </CONCLUSION> <CONCLUSION> b </CONCLUSION>", {"CONCLUSION": "a"}),
        ("<SUMMARY> s < 3 </SUMMARY> x <REASONING> r", {"SUMMARY": "s < 3", "REASONING": "r"}),
    ],
)
def test_stages(text, found):
    assert find_stages(text) == found
    assert list(find_stages(text)) == list(found)


@pytest.mark.parametrize(
    ("text", "conclusion"),
    [(WHOLE, "2"), ("<CONCLUSION> a", "a"), (" <CAPTION> c </CAPTION>", "<CAPTION> c </CAPTION>"), (" 2.\n", "2.")],
)
def test_the_conclusion_of_a_whole_answer(text, conclusion):
    assert find_conclusion(text) == conclusion


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Four.", "four"),
        (' "15.0\n  Million"! ', "15.0 million"),
        ("", ""),
        (" ?! ", "?!"),
        ("+ +", "+ +"),
        ("-5%.", "-5"),
        ("\u22125 \u00b0C", "-5 \u00b0c"),
        ("(-$5)", "-5"),
        ("$5", "5"),
        ("+5", "5"),
        ("- 5", "5"),
        ("<5 mm", "<5 mm"),
        (">5 mm", ">5 mm"),
        ("-.5 cm", "-.5 cm"),
        (".5", ".5"),
        ("...5", "5"),
        ("-3/4", "-3/4"),
    ],
)
def test_answers_differ_in_more_than_punctuation_at_their_ends(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize("cut", range(len(WHOLE)))
def test_a_growing_answer_never_loses_a_stage(cut):
    found = find_stages(WHOLE[:cut])
    assert list(found) == list(BODIES)[: len(found)]
    for name, body in list(found.items())[:-1]:
        assert body == BODIES[name]


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ("", True),
        ("\n<", True),
        ("<SUM", True),
        ("<SUMMARY> x", True),
        ("<CAPTION>", True),
        ("A", False),
        ("<b", False),
    ],
)
def test_whether_stages_may_come(text, may):
    assert may_be_staged(text) is may


@pytest.mark.parametrize(
    ("text", "staged"),
    [
        (WHOLE, True),
        (f"Well. {WHOLE} So there.", True),
        (WHOLE.replace("</CAPTION>", ""), False),
        (WHOLE.removesuffix("</CONCLUSION>"), False),
        (WHOLE.replace("SUMMARY", "CAPTION", 2), False),
        (WHOLE.replace("REASONING", "REASON"), False),
        ("It is a cat.", False),
    ],
)
def test_whether_an_answer_has_its_four_stages(text, staged):
    assert is_staged(text) is staged


def test_a_stage_reaches_from_tag_to_tag():
    stages = locate_stages(f"Well. {WHOLE}")
    assert [f"Well. {WHOLE}"[s.start : s.end] for s in stages.values()] == WHOLE.split("\n\n")
    unclosed = "<SUMMARY> a <CAPTION> b"
    assert [unclosed[s.start : s.end] for s in locate_stages(unclosed).values()] == ["<SUMMARY> a ", "<CAPTION> b"]
