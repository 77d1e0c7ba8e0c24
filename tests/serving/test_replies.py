"""How an answer is divided and cut for a client."""

from types import SimpleNamespace

import pytest

from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.trace import CandidateTrace, StageTrace, Trace
from llava_cot_jax.serving.orders import Answered
from llava_cot_jax.serving.replies import NO_TEXT, cut_at_stop, cut_to_tokens, make_choice, split_conclusion
from llava_cot_jax.stages import find_conclusion, find_stages
from tests.serving.test_chat_request import read


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained("shapes")


def whole(text: str, ended: str = "eos", tokens: int = 40) -> Answered:
    """An answer that was sampled whole."""
    candidate = CandidateTrace(text, ended, "", tokens, -1.0, -0.1)
    trace = Trace("?", 0, "", [StageTrace("whole", [candidate], [], [], 0)], 0, {"prompt": 9}, {}, {})
    return Answered(Answer(text, find_stages(text), find_conclusion(text), trace), is_shrunk=False)


STAGED = "<SUMMARY> s </SUMMARY>\n\n<REASONING> r </REASONING>\n\n<CONCLUSION> two stars </CONCLUSION>"


@pytest.mark.parametrize(
    ("text", "conclusion", "reasoning"),
    [
        (STAGED, "two stars", "<SUMMARY> s </SUMMARY>\n\n<REASONING> r </REASONING>"),
        ("<CONCLUSION> two </CONCLUSION>", "two", None),
        (" two ", "two", None),
        (
            "<SUMMARY> s </SUMMARY> <CONCLUSION> </CONCLUSION>",
            "<SUMMARY> s </SUMMARY> <CONCLUSION> </CONCLUSION>",
            None,
        ),
    ],
)
def test_a_conclusion_is_told_from_the_rest(text, conclusion, reasoning):
    assert split_conclusion(whole(text).answer) == (conclusion, reasoning)


def test_a_content_is_never_empty(processor):
    for text, fields in (("", {}), (STAGED, {"stop": "two"})):
        choice = make_choice(whole(text), read(**fields), processor)
        assert choice.content == NO_TEXT and choice.finish_reason == "stop"


def test_reasons_why_an_answer_ends(processor):
    def reason(found: Answered, **fields) -> tuple[str, str]:
        choice = make_choice(found, read(**fields), processor)
        return choice.content, choice.finish_reason

    assert reason(whole(STAGED)) == ("two stars", "stop")
    assert reason(whole(STAGED), max_tokens=32768) == ("two stars", "stop")
    assert reason(whole(STAGED), max_tokens=1)[1] == "length"
    assert "two stars".startswith(reason(whole(STAGED), max_tokens=1)[0])
    assert reason(whole(STAGED), stop=" stars", max_tokens=9) == ("two", "stop")
    assert reason(whole("<SUMMARY> s", "max_new_tokens")) == ("<SUMMARY> s", "length")


def test_stops():
    assert cut_at_stop("a b c", ("c", "b")) == "a "
    assert cut_at_stop("a b c", ("d",)) == "a b c"


def test_a_cut_leaves_whole_characters(processor):
    text = "\u00e9\u00e8 \u6570"
    length = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    cuts = [cut_to_tokens(text, most, processor) for most in range(1, length + 1)]
    assert cuts[-1] == text and all(text.startswith(cut) for cut in cuts)
    assert len(set(cuts)) < len(cuts)  # where a character has several tokens


def test_tokens_of_the_conclusion_are_not_those_of_the_reasoning(processor):
    choice = make_choice(whole(STAGED, tokens=40), read(), processor)
    conclusion = len(processor.tokenizer("two stars", add_special_tokens=False)["input_ids"])
    assert (choice.prompt_tokens, choice.answer_tokens, choice.reasoning_tokens) == (9, 40, 40 - conclusion)
    plain = make_choice(whole("two"), read(), SimpleNamespace(tokenizer=processor.tokenizer, decode=processor.decode))
    assert plain.reasoning_tokens == 0
