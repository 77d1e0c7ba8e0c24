"""Questions of a data set that can be put to a model."""

from dataclasses import replace

from llava_cot_jax.data.rows import Turn
from llava_cot_jax.evaluation.held_out import HeldOutAnswer, find_answerable
from llava_cot_jax.processing.processor import Processor
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


def test_an_answer_agrees_stage_by_stage():
    """The steps differ, and the conclusions are the same words; without stages, the last paragraphs are compared."""
    one = "<REASONING> 1 + 1 </REASONING>\n\n<CONCLUSION> B:  two </CONCLUSION>"
    other = "<REASONING> 3 - 1 </REASONING>\n\n<CONCLUSION>B: two</CONCLUSION>\n"
    answer = HeldOutAnswer("How many?", one, other)
    assert answer.agrees("CONCLUSION") and not answer.agrees("REASONING")
    assert HeldOutAnswer("How many?", "1 + 1\n\nB:  two", "3 - 1\n\nB: two").agrees("CONCLUSION")
    assert not HeldOutAnswer("How many?", "B: two\n\n1 + 1", "3 - 1\n\nB: two").agrees("CONCLUSION")
