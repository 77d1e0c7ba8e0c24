"""Slots whose questions come and go at any time: the answers of those that stay are what they are alone."""

import pytest

from llava_cot_jax.search.growing_slots import GrowingSlots
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.scorers import LogProbability
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.search.stream import Question
from tests.search.models import random_model, scene
from tests.search.test_stream import plain

STRATEGY = StageBeam(2, LogProbability(), temperature=1.0, max_new_tokens=12, top_k=None, top_p=1.0)


@pytest.mark.slow
def test_what_is_removed_leaves_the_others_as_they_are():
    """Questions come after every second step, and every third is removed in the middle of its second stage."""
    model, processor = random_model(1, eos=tuple(range(0, 500, 60)))
    builder = RequestBuilder(processor, STRATEGY)
    asked = [Question(scene(i)[1], scene(i)[0], seed=i) for i in range(9)]
    room = {"prompt_tokens": 128, "images": 1}
    expected = list(Reasoner(model, processor, STRATEGY).answer_stream(asked, slots=3, **room))
    slots, found, told = GrowingSlots(model, builder, 3, **room), {}, {}
    waiting = list(enumerate(asked))
    while waiting or slots.num_occupied:
        if waiting:
            index, question = waiting[0]
            requests = builder.build([question.images], [question.question], question.seed)
            if slots.admit(index, requests):
                waiting.pop(0)
                told[index] = []
        if not slots.num_occupied:
            continue
        for index, answer in slots.finish_decoding(slots.begin_decoding(max_steps=2)):
            found[index] = answer
            told.pop(index)
        for index, texts in list(told.items()):
            texts += slots.stage_texts(index, len(texts))
            if index not in found and index % 3 == 0 and texts:
                slots.remove(index)
                told.pop(index)
            elif texts:
                assert expected[index].answer.text.startswith("\n\n".join(texts))
    assert found.keys() == {1, 2, 4, 5, 7, 8}
    for index, answer in found.items():
        assert plain(answer) == plain(expected[index].answer)
