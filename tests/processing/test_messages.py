"""Tests of questions' ``<image>`` markers: which of them stand for images, and which are words."""

import pytest

from llava_cot_jax.processing.messages import question_text, remove_markers, user_turn
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.strategies import Greedy
from tests.data.rows import demo_processor
from tests.demo import draw_picture

EDGES = [
    ("How many?", "How many?", 0),
    ("<image>\nHow many?", "How many?", 1),
    ("How many?\n<image>", "How many?", 1),
    (" <image> \r\n How many? ", "How many? ", 1),
    ("<image>How many?", "How many?", 1),
    ("How many? <image>", "How many?", 1),
    ("<image>\n<image>\nCompare.", "Compare.", 2),
    ("<image><image> Compare.", "Compare.", 2),
    ("<image>\nWhich differs?\n<image>\n<image>", "Which differs?", 3),
    ("<image>\nWhat does <image> mean in HTML?", "What does <image> mean in HTML?", 1),
    ("<image>\nWhat stands for <image>", "What stands for <image>", 1),
    ("What differs between <image> and <image>", "What differs between <image> and <image>", 0),
    ("<image> and <image> differ. How?", "<image> and <image> differ. How?", 0),
    ("Where is <image>?\n<image>", "Where is <image>?", 1),
    ("A tag: <image>.", "A tag: <image>.", 0),
    ("<image>", "", 1),
    ("", "", 0),
]


@pytest.mark.parametrize(("question", "text", "count"), EDGES)
def test_markers_at_the_edges_alone(question, text, count):
    assert remove_markers(question) == (text, count)


def test_a_long_text_takes_no_time():
    """A pattern that is tried at every space would take minutes."""
    assert remove_markers(" " * 200_000 + "x" + " \n" * 100_000)[1] == 0


def test_a_question_is_put_as_it_is_trained():
    assert user_turn("<image>\nHow many?", 1) == user_turn("How many?", 1)
    assert question_text("<image>", 0) == "<image>"  # without an image it can only be a word
    with_marker, without = (
        RequestBuilder(demo_processor(), Greedy()).build([draw_picture()], [question])
        for question in ("<image>\nHow many?", "How many?")
    )
    assert with_marker.inputs.model_inputs["input_ids"].tolist() == without.inputs.model_inputs["input_ids"].tolist()
    assert with_marker.inputs.question.tokens.tolist() == without.inputs.question.tokens.tolist()
