"""Batches of a search that cannot stream: what is beside a question changes nothing, and a bad question fails alone."""

from dataclasses import replace

import pytest

from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.search import reasoner
from llava_cot_jax.search.batches import AnswerBatches
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.scorers import LogProbability
from llava_cot_jax.search.sentence_beam import SentenceBeam
from llava_cot_jax.search.stream import Question
from tests.search.models import random_model, scene
from tests.search.test_search import plain

STRATEGY = SentenceBeam(2, LogProbability(), 1.2, 14, max_sentence_tokens=6, max_sentences=4)


def questions() -> list[Question]:
    """Five questions: with an image, a longer one without, one that cannot be encoded, and two more with images."""
    (first, second, third) = (scene(i) for i in range(3))
    return [
        Question(first[1], first[0], 1),
        Question(f"Please tell me this: {second[1]} And nothing else?", None, 2),
        Question("What is <|begin_of_text|>?", None, 3),
        Question(third[1], third[0], 4),
        Question(first[1], second[0], 5),
    ]


@pytest.fixture(scope="module")
def batches(prompts):
    """A function that answers questions by their places in batches of two, in the room of all."""
    model, processor = random_model(1, eos=tuple(range(0, 500, 60)))
    builder = RequestBuilder(processor, STRATEGY, prompts)

    def answer(*places: int) -> dict:
        asked = [questions()[place] for place in places]
        made = AnswerBatches(model, builder, iter(asked), size=2, prompt_tokens=128, images=1)
        found = {places[streamed.index]: streamed for streamed in made}
        assert all(asked[streamed.index] == streamed.question for streamed in found.values())
        return found

    return answer


def told(streamed) -> dict:
    return plain(replace(streamed.answer, trace=replace(streamed.answer.trace, seconds={})))


@pytest.mark.slow
def test_neighbours_change_nothing_and_a_bad_question_fails_alone(batches, monkeypatch):
    """All five; others beside them and fewer at the end, which compiles nothing; and logits that are not finite."""
    straight = batches(0, 1, 2, 3, 4)
    assert sorted(straight) == [0, 1, 2, 3, 4]
    assert straight[2].answer is None and "<|begin_of_text|>" in str(straight[2].error)
    counter = CompilationCounter()
    for places in ((4, 0, 3), (1,), (2, 2), (3, 2, 1)):
        for place, streamed in batches(*places).items():
            assert (streamed.answer is None) == (place == 2)
            assert place == 2 or told(streamed) == told(straight[place])
    assert counter.count == 0
    assert len({streamed.answer.text for streamed in straight.values() if streamed.answer}) == 4

    calls, check = [], reasoner.check_finite

    def fail_second(stages, spec, place, dtype):
        calls.append(place)
        if len(calls) == 2:
            raise reasoner.UserError(f"no number in {place}")
        check(stages, spec, place, dtype)

    monkeypatch.setattr(reasoner, "check_finite", fail_second)
    beside = batches(0, 1)
    assert str(beside[1].error) == "no number in the question" and beside[1].answer is None
    assert told(beside[0]) == told(straight[0])
