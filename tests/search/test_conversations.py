"""Searches for the answer to a conversation's last question."""

import numpy as np
import pytest

from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.strategies import StageBeam
from tests.search.models import random_model, scene

BEAM = StageBeam(2, temperature=0.9, max_new_tokens=6)


def conversation(question: str, *images) -> list[dict]:
    return [
        {"role": "user", "content": [*({"type": "image", "image": image} for image in images), text("And before?")]},
        {"role": "assistant", "content": "Nothing."},
        {"role": "user", "content": [text(question)]},
    ]


def text(content: str) -> dict:
    return {"type": "text", "text": content}


@pytest.fixture(scope="module")
def random():
    return random_model(1)


@pytest.mark.slow
def test_one_question_is_answered_as_its_text_is(random, prompts):
    """Messages and texts share a batch, with the images inside, beside, or none."""
    reasoner = Reasoner(*random, BEAM, prompts)
    (one, asked), (other, _) = scene(0), scene(1)
    message = {"role": "user", "content": [{"type": "image"}, text(asked)]}
    inside = {"role": "user", "content": [{"type": "image", "image": one}, text(asked)]}
    images = [one, one, None, other]
    answers = reasoner.answer_batch(images, [asked, [message], [inside], asked], seeds=5)
    assert answers[0].text == answers[1].text == answers[2].text != answers[3].text
    assert answers[0].trace.stages == answers[1].trace.stages == answers[2].trace.stages
    assert {answer.trace.question for answer in answers} == {asked}
    assert {answer.trace.vision_encoder_calls for answer in answers} == {1}


@pytest.mark.slow
def test_the_model_and_the_judge_are_told_the_whole_conversation(random, prompts):
    """The prompt has the turns as the template writes them, the judge's question their texts, and both all images."""
    _, processor = random
    (one, asked), (other, _) = scene(0), scene(1)
    requests = RequestBuilder(processor, BEAM, prompts).build([None], [conversation(asked, one, other)])
    inputs = requests.inputs
    told = inputs.question[0]
    assert processor.decode(told.tokens[: told.lengths]) == f"user: And before?\nassistant: Nothing.\nuser: {asked}"
    image = processor.config.image_token_index
    prompt = inputs.model_inputs["input_ids"][0, : inputs.lengths[0]]
    header = inputs.chat_headers[0, 0]
    for ids in (prompt, header.tokens[: header.lengths]):
        assert np.count_nonzero(np.asarray(ids) == image) == 2
    assert (requests.questions, [len(images) for images in requests.images]) == ([asked], [2])
    apart = RequestBuilder(processor, BEAM, prompts).build([[one, other]], [asked]).inputs.model_inputs
    np.testing.assert_array_equal(inputs.model_inputs["pixel_values"], apart["pixel_values"])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_conversation_is_answered_alone_as_beside_others(random, prompts):
    reasoner = Reasoner(*random, BEAM, prompts)
    (one, asked), (other, _) = scene(0), scene(1)
    questions = [conversation(asked, one), asked, conversation(asked, other)]
    forth = reasoner.answer_batch([None, other, None], questions, seeds=[3, 4, 5])
    back = reasoner.answer_batch([None, other, None], questions[::-1], seeds=[5, 4, 3])
    assert [a.text for a in forth] == [a.text for a in back[::-1]]
    assert len({a.text for a in forth}) == 3
