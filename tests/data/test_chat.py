"""Tests of the tokens of a conversation and of those that are trained on, against a plain version of the rules."""

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest

from llava_cot_jax.data.chat import Chat, ConversationSize, SkippedConversation
from llava_cot_jax.data.rows import Turn
from llava_cot_jax.data.settings import ChatSettings
from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.processing.tokenizer import make_tokenizer
from tests.data.rows import demo_processor, staged
from tests.demo import CORPUS, VOCAB_SIZE, demo_config
from tests.search.models import tagged_processor

TOKENIZER = demo_processor().tokenizer

ANSWER = staged("Count.", "Two red\n\ncircles: ○ ○.", "One and one.", "It's 2.")
TURNS = (
    Turn("\n How many circles?  ", f"\n{ANSWER} ", images=1),
    Turn("And what\ncolour? é ☃", "They are red.\n"),
    Turn("Sure of <image>?", "Yes ![a](<image>) indeed."),
)
"""A staged answer, then two without tags; markers that are text, space at the ends, characters of several bytes."""

Marked = list[tuple[int, bool, int]]
"""Token, whether it is trained on, and its stage."""


def chat(**settings) -> Chat:
    return Chat(demo_processor(), ChatSettings(**settings))


def mark(text: str, trained: bool = False, stage: int = 0) -> Marked:
    return [(token, trained, stage) for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]


def turn(question: str, answer: Marked, image: bool = False, blank_trained: bool = False) -> Marked:
    return [
        *mark("<|start_header_id|>"),
        *mark("user"),
        *mark("<|end_header_id|>"),
        *mark("\n\n"),
        *(mark("<|image|>") if image else []),
        *mark(question),
        *mark("<|eot_id|>"),
        *mark("<|start_header_id|>"),
        *mark("assistant"),
        *mark("<|end_header_id|>"),
        *mark("\n\n", trained=blank_trained),
        *answer,
        *mark("<|eot_id|>", trained=True),
    ]


def check(conversation, expected: Marked) -> None:
    found = list(zip(conversation.ids, conversation.loss_mask.tolist(), conversation.stage.tolist(), strict=True))
    assert [TOKENIZER.decode([t]) for t, *_ in found] == [TOKENIZER.decode([t]) for t, *_ in expected]
    assert found == expected


def tagged(number: int, text: str) -> Marked:
    return mark(text, trained=True, stage=number)


STAGED = [
    *tagged(1, "<SUMMARY> Count. </SUMMARY>"),
    *mark("\n\n", True),
    *tagged(2, "<CAPTION> Two red\n\ncircles: ○ ○. </CAPTION>"),
    *mark("\n\n", True),
    *tagged(3, "<REASONING> One and one. </REASONING>"),
    *mark("\n\n", True),
    *tagged(4, "<CONCLUSION> It's 2. </CONCLUSION>"),
]
UNTAGGED = [
    *tagged(1, "Count."),
    *mark("\n\n", True),
    *tagged(2, "Two red\n\ncircles: ○ ○."),
    *mark("\n\n", True),
    *tagged(3, "One and one."),
    *mark("\n\n", True),
    *tagged(4, "It's 2."),
]
CONCLUSION = tagged(4, "It's 2.")


def whole(first: Marked, blank_trained: bool = False) -> list[Marked]:
    """Tokens of the three turns."""
    return [
        turn("How many circles?", first, True, blank_trained),
        turn("And what\ncolour? é ☃", mark("They are red.", True), False, blank_trained),
        turn("Sure of <image>?", mark("Yes ![a](<image>) indeed.", True), False, blank_trained),
    ]


def bos(times: int = 1) -> Marked:
    return mark("<|begin_of_text|>") * times


@pytest.mark.parametrize(("variant", "first"), [("staged", STAGED), ("untagged", UNTAGGED), ("conclusion", CONCLUSION)])
def test_every_token_of_a_conversation(variant, first):
    conversation = chat(variant=variant).encode(TURNS)
    check(conversation, sum(whole(first), bos()))
    assert conversation.turns == 3


def test_upstreams_choices():
    """LLaVA-CoT's own code has two BOS and trains on the blank line after an assistant's header."""
    check(chat(upstream_quirks=True).encode(TURNS), sum(whole(STAGED, blank_trained=True), bos(2)))


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("kept", [1, 2])
def test_what_is_too_long_loses_whole_turns(kept, upstream):
    turns = whole(STAGED, blank_trained=upstream)
    expected = sum(turns[:kept], bos(1 + upstream))
    for room in (0, len(turns[kept]) - 1):
        conversation = chat(max_length=len(expected) + room, upstream_quirks=upstream).encode(TURNS)
        check(conversation, expected)
        assert conversation.turns == kept
    assert chat(max_length=len(expected) + len(turns[kept]), upstream_quirks=upstream).encode(TURNS).turns == kept + 1


def test_a_first_answer_that_does_not_fit():
    needed = 1 + len(whole(STAGED)[0])
    with pytest.raises(SkippedConversation, match=f"first answer does not fit into {needed - 1} tokens"):
        chat(max_length=needed - 1).encode(TURNS)


def test_a_token_that_runs_past_a_tag_belongs_to_the_stage():
    """Llama 3's vocabulary has ">" and the blank line as one token."""
    merged = make_tokenizer([*CORPUS, *[ANSWER] * 40], VOCAB_SIZE)
    processor = Processor(demo_config(merged), merged)
    conversation = Chat(processor, ChatSettings()).encode(TURNS[:1])
    tokens = [merged.decode([i]) for i in conversation.ids]
    closing = [i for i, token in enumerate(tokens) if token == ">\n\n"]
    assert [conversation.stage[i] for i in closing] == [1, 2, 3]
    assert conversation.stage[np.array(closing) + 1].tolist() == [2, 3, 4]
    assert conversation.loss_mask[closing].all()


@pytest.mark.parametrize(
    ("answer", "variant", "kept"),
    [
        ("It is 2.", "conclusion", "It is 2."),  # no tags: an answer as it stands
        ("It is 2.", "untagged", "It is 2."),
        ("Well. <CONCLUSION> 2 </CONCLUSION> Bye.", "staged", "Well. <CONCLUSION> 2 </CONCLUSION> Bye."),
        ("Well. <CONCLUSION> 2 </CONCLUSION> Bye.", "untagged", "2"),
        ("<SUMMARY></SUMMARY> <CONCLUSION> 2", "untagged", "2"),
        ("<SUMMARY> a </SUMMARY>", "conclusion", None),
        ("<CONCLUSION> </CONCLUSION>", "conclusion", None),
        (" <image> ", "staged", "<image>"),
    ],
)
def test_an_answer_out_of_the_ordinary(answer, variant, kept):
    first, second = Turn("How many?", "Two.", images=1), Turn("Sure?", answer, images=1)
    alone = chat(variant=variant).encode([first])
    both = chat(variant=variant).encode([first, second])
    assert both.turns == (1 if kept is None else 2)
    added = [token for token, trained in zip(both.ids, both.loss_mask, strict=True) if trained][alone.loss_mask.sum() :]
    assert TOKENIZER.decode(added) == ("" if kept is None else f"{kept}<|eot_id|>")
    if kept is None:
        with pytest.raises(SkippedConversation, match="nothing is left"):
            chat(variant=variant).encode([second, first])


def test_a_text_that_spells_a_special_token_is_skipped():
    for turns in ([Turn("a<|eot_id|>", "b")], [Turn("a", "b<|image|>")], [*TURNS, Turn("a", "<|start_header_id|>")]):
        with pytest.raises(SkippedConversation, match="special token"):
            chat().encode(turns)


def test_tags_that_are_tokens_of_their_own_are_trained_on():
    processor = tagged_processor()
    conversation = Chat(processor, ChatSettings()).encode(TURNS[:1])
    trained = [token for token, use in zip(conversation.ids, conversation.loss_mask, strict=True) if use]
    assert processor.tokenizer.decode(trained) == f"{ANSWER}<|eot_id|>"
    tags = [processor.tokenizer.convert_tokens_to_ids(tag) for tag in re.findall("</?[A-Z]+>", ANSWER)]
    assert len(tags) == 8 and [token for token in trained if token in tags] == tags
    stages = [stage for token, stage in zip(conversation.ids, conversation.stage, strict=True) if token in tags]
    assert stages == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_turn_that_would_not_end_an_answer_is_refused():
    processor = demo_processor()
    text = replace(processor.config.text, eos_token_ids=processor.config.text.eos_token_ids[:1])
    with pytest.raises(UserError, match=r"<\|eot_id\|> ends no answer"):
        Chat(Processor(replace(processor.config, text=text), processor.tokenizer), ChatSettings())


@pytest.mark.parametrize("settings", [{}, {"upstream_quirks": True}, {"variant": "conclusion"}, {"max_length": 60}])
def test_lengths_are_those_of_the_tokens(settings):
    conversations = [TURNS, TURNS[:1], TURNS[1:], [Turn("a", "<|eot_id|>")], [Turn("a", " ")], TURNS[::-1]]
    made = pickle.loads(pickle.dumps(chat(**settings)))
    for conversation, length in zip(conversations, made.sizes(conversations), strict=True):
        if isinstance(length, ConversationSize):
            made_of = made.encode(conversation)
            assert length == ConversationSize(len(made_of.ids), made_of.images, len(conversation) - made_of.turns)
        else:
            with pytest.raises(SkippedConversation, match=length):
                made.encode(conversation)


def test_another_chat_format_is_refused():
    processor = pickle.loads(pickle.dumps(demo_processor()))
    for image, said in ((" <|image|>", "Llama 3's chat format"), ("", "it is not for this model")):
        template = "{{ bos_token }}" + image + "{% for m in messages %}[{{ m.role }}]{% endfor %}"
        processor.tokenizer.chat_template = template
        with pytest.raises(UserError, match=said):
            Chat(processor, ChatSettings()).encode(TURNS)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"variant": "tagged"}, "'tagged'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_images": 0}, "max_images is 0"),
    ],
)
def test_wrong_settings(setting, named):
    with pytest.raises(UserError, match=named):
        ChatSettings(**setting)


@pytest.mark.parametrize(("name", "value"), [("max_images", 1), ("text_only", False)])
def test_conversations_that_the_user_leaves_out(name, value):
    kept = [Turn("a", "b", images=1)]
    left_out = {"max_images": [Turn("a", "b", images=1), Turn("c", "d", images=1)], "text_only": [Turn("a", "b")]}[name]
    assert chat(**{name: value}).encode(kept).images == 1
    assert chat().encode(left_out).turns == len(left_out)
    with pytest.raises(SkippedConversation, match=name):
        chat(**{name: value}).encode(left_out)


def test_several_images():
    """The images of a turn stand before its text."""
    question, other = turn("Compare.", mark("Same.", True), True), turn("And now?", mark("No.", True), True)
    at = question.index(*mark("<|image|>"))
    turns = [Turn("Compare.", "Same.", images=2), Turn("And now?", "No.", images=1)]
    whole = [*bos(), *question[:at], *mark("<|image|>"), *question[at:], *other]
    check(chat().encode(turns), whole)
    assert chat().encode(turns).images == 3
    cut = chat(max_length=len(whole) - 1).encode(turns)
    assert (cut.turns, cut.images) == (1, 2)


def said(role: str, text: str) -> Marked:
    header = [*mark("<|start_header_id|>"), *mark(role), *mark("<|end_header_id|>")]
    return [*header, *mark("\n\n"), *mark(text), *mark("<|eot_id|>")]


DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("kept", [1, 2])
def test_without_an_image_the_system_has_a_message(kept, upstream):
    """That of Llama 3.2's chat format, which names two dates and then has the text of the row."""
    turns = [Turn("What?", "That.", system=" Be brief. "), Turn("Why?", "Because.")]
    answered = [
        turn("What?", mark("That.", True), False, upstream),
        turn("Why?", mark("Because.", True), False, upstream),
    ]
    expected = sum(answered[:kept], [*bos(1 + upstream), *said("system", f"{DATES}Be brief.")])
    settings = {"upstream_quirks": upstream, "max_length": len(expected) + len(answered[1]) * (kept == 2)}
    check(chat(**settings).encode(turns), expected)
    assert chat(**settings).encode(turns).turns == kept


def test_beside_an_image_the_text_of_the_system_comes_before_the_question():
    turns = [Turn("What?", "That.", system="Be brief."), Turn("Why?", "Because.", images=1)]
    text = TOKENIZER.decode(chat().encode(turns).ids)
    assert text.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nBe brief.\n\nWhat?<|eot_id|>")
    assert "<|image|>Why?" in text and "system" not in text


@pytest.mark.parametrize("field", ["question", "answer", "system"])
def test_half_of_a_surrogate_pair_is_skipped(field):
    with pytest.raises(SkippedConversation, match="half of a surrogate pair"):
        chat().encode([replace(Turn("a", "b"), **{field: "\ud83d"})])


def test_a_block_of_conversations_that_are_all_skipped():
    """The tokenizer of transformers takes no empty list."""
    (reason,) = chat().sizes([[Turn("a", "<|eot_id|>")]])
    assert "special token" in reason
