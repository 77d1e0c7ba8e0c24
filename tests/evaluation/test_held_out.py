"""Questions of a data set that can be put to a model."""

from dataclasses import replace

from llava_cot_jax.data.rows import Turn
from llava_cot_jax.evaluation.held_out import HeldOutAnswer, find_answerable
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.stage_format import StageFormat
from tests.data.rows import Noise, demo_processor


class Asked(Noise):
    """Rows of which row 1 spells a control token, and row 2 is longer than the context."""

    def turns(self, index: int) -> tuple[Turn, ...]:
        question = {1: "what is <|eot_id|>?", 2: "red " * 200}.get(index, "How many?")
        return (Turn(question, "One.", images=index % 2), Turn("And then?", "Two.", images=1))


def test_the_first_questions_that_leave_room_for_an_answer_are_found():
    processor = demo_processor()
    config = replace(processor.config, text=replace(processor.config.text, max_position_embeddings=100))
    assert find_answerable(Processor(config, processor.tokenizer), Asked(9), 4) == [0, 3, 4, 5]


def test_an_answer_agrees_in_its_format():
    """The steps differ, and the conclusions are the same words; in another format, the last paragraphs are compared."""
    mulberry = StageFormat.load("mulberry")
    one = "### Let's think step by step.\n1 + 1\n\n### The final answer is: B:  two"
    other = "### Let's think step by step.\n3 - 1\n\n### The final answer is:B: two\n"
    answer = HeldOutAnswer("How many?", one, other)
    assert answer.agrees("CONCLUSION", mulberry) and not answer.agrees("REASONING", mulberry)
    assert not answer.agrees("CONCLUSION")
