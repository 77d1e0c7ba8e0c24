"""Conversations against transformers' own template and processor, and against the same question as a text."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor

from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.conversation import read_conversation
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.questions import read_messages
from tests.demo import write_demo
from tests.processing.test_processor import picture


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


@pytest.fixture(scope="module")
def processor(demo: Path) -> Processor:
    return Processor.from_pretrained(demo)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, sizes = tmp_path_factory.mktemp("images"), {"wide": (40, 90), "square": (56, 56), "tall": (150, 60)}
    for name, size in sizes.items():
        picture(*size).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in sizes}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


CONVERSATIONS = {
    "one question": [{"role": "user", "content": "How many?"}],
    "parts": [{"role": "user", "content": [text("How "), text("many?")]}],
    "one image": [{"role": "user", "content": [{"type": "image", "url": "wide"}, text("How many?")]}],
    "an image at the end": [{"role": "user", "content": [text("What is this: "), {"type": "image", "path": "tall"}]}],
    "system prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}],
    "earlier turns": [
        {"role": "user", "content": [{"type": "image", "image": "square"}, text("What is this?")]},
        {"role": "assistant", "content": [text("A cat.")]},
        {"role": "user", "content": [text("And is it like "), {"type": "image", "path": "tall"}, text(" this one?")]},
    ],
    "several images": [
        {
            "role": "user",
            "content": [{"type": "image", "url": n} for n in ("wide", "square", "tall")] + [text("Which?")],
        },
        {"role": "assistant", "content": [text("The last.")]},
        {"role": "user", "content": [text("Why?")]},
    ],
}


def located(messages: list, images: dict, as_image: bool = False) -> list:
    """Return messages with the file of each image by the key that it has."""
    copy = json.loads(json.dumps(messages))
    for message in copy:
        for part in message["content"] if isinstance(message["content"], list) else ():
            for key in ("image", "url", "path"):
                if key in part:
                    path = images[part.pop(key)]
                    part.update({"image": Image.open(path)} if as_image else {key: str(path)})
    return copy


def bare(messages: list, images: dict) -> tuple[list, list]:
    """Return messages whose images have no source, and the images."""
    copy, found = json.loads(json.dumps(messages)), []
    for message in copy:
        for part in message["content"] if isinstance(message["content"], list) else ():
            found += [str(images[part.pop(key)]) for key in ("image", "url", "path") if key in part]
    return copy, found


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_what_transformers_makes_of_it(processor: Processor, images: dict, name: str) -> None:
    """Ids, pixels and masks; whether the images are in the messages, as paths or opened, or beside them."""
    given = located(CONVERSATIONS[name], images)
    image_processor = MllamaImageProcessorPil(size={"height": 56, "width": 56}, do_rescale=False, do_normalize=False)
    theirs = MllamaProcessor(image_processor, processor.tokenizer, chat_template=processor.tokenizer.chat_template)
    reference = theirs.apply_chat_template(
        given, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    for messages, beside in (
        (given, []),
        (located(CONVERSATIONS[name], images, as_image=True), []),
        bare(CONVERSATIONS[name], images),
    ):
        conversation = read_conversation(messages, beside)
        ours = processor([processor.prompt(conversation.asked("", ""))], [conversation.images])
        assert set(ours) == set(reference)
        for key, value in ours.items():
            np.testing.assert_array_equal(value, reference[key], err_msg=key)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("around", [("", ""), ("Look. ", "\nThink.")])
def test_one_question_is_the_same_as_a_text(processor: Processor, images: dict, count: int, around: tuple) -> None:
    paths = [str(path) for path in images.values()][:count]
    as_text = read_conversation("How many?", paths)
    parts = [*({"type": "image", "path": path} for path in paths), text("How many?")]
    alike = [[{"role": "user", "content": parts}]]
    alike += [] if count else [[{"role": "user", "content": "How many?"}]]
    for messages in alike:
        conversation = read_conversation(messages)
        assert processor.prompt(conversation.asked(*around)) == processor.prompt(as_text.asked(*around))
        assert (conversation.images, conversation.question, conversation.told) == (paths, "How many?", "How many?")
    assert "".join(["How many?".join(around)]) in processor.prompt(as_text.asked(*around))


def test_texts_around_a_question_leave_its_images_at_their_places(processor: Processor) -> None:
    messages = [*user_turn("Hi"), {"role": "assistant", "content": "Yes?"}]
    content = [{"type": "image", "image": "a"}, text("Is "), {"type": "image", "image": "b"}, text(" it?")]
    asked = read_conversation([*messages, {"role": "user", "content": content}]).asked("Look: ", " Think.")
    assert processor.prompt(asked).endswith(
        "<|image|>Look: Is <|image|> it? Think.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    alone = read_conversation([{"role": "user", "content": [{"type": "image", "image": "a"}]}])
    assert "<|image|>Look: Think.<|eot_id|>" in processor.prompt(alone.asked("Look: ", "Think."))


def test_a_judge_is_told_what_was_said_before() -> None:
    conversation = read_conversation(CONVERSATIONS["earlier turns"])
    assert conversation.question == "And is it like  this one?"
    assert conversation.told == "user: What is this?\nassistant: A cat.\nuser: And is it like  this one?"
    assert conversation.images == ["square", "tall"]


def user(*parts) -> list:
    return [{"role": "user", "content": list(parts)}]


MISTAKES = {
    "None": (None, [], "a question is None; it must be a text, or a list of messages"),
    "a mapping": ({"role": "user", "content": "Hi"}, [], "it must be a text, or a list of messages"),
    "nothing": ([], [], "there are no messages"),
    "a message is None": ([None], [], "a message must be a mapping"),
    "a message is a text": (["Hi"], [], "a message must be a mapping"),
    "no role": ([{"content": "Hi"}], [], 'must have "role"'),
    "no content": ([{"role": "user"}], [], 'must have "role"'),
    "role of a number": ([{"role": 3, "content": "Hi"}], [], "the last message is of role 3"),
    "content is None": ([{"role": "user", "content": None}], [], "must be a text or a list of parts; it is None"),
    "content of a number": ([{"role": "user", "content": 3}], [], "must be a text or a list of parts; it is 3"),
    "a part is a text": (user("Hi"), [], "the content of a user message must be"),
    "an unknown type": (user({"type": "video", "url": "x"}), [], "the content of a user message must be"),
    "a text of a number": (user({"type": "text", "text": 3}), [], "the content of a user message must be"),
    "no image for a place": (user({"type": "image"}), [], "1 images without a source, and 0 images are given"),
    "no place for an image": (user(text("Hi")), ["a.png"], "0 images without a source, and 1 images are given"),
    "more images beside": (user({"type": "image"}), ["a", "b"], "1 images without a source, and 2 images"),
    "a source and one beside": (user({"type": "image", "url": "a"}), ["b"], "0 images without a source, and 1"),
    "two sources": (user({"type": "image", "url": "a", "path": "b"}), [], "an image of a message has 2 sources"),
    "a source of None": (user({"type": "image", "url": None}), [], "has the source None"),
    "an unknown source": (user({"type": "image", "base64": "a"}), [], "an image of a message has the key base64"),
    "assistant last": ([*user_turn("Hi"), {"role": "assistant", "content": "Yes?"}], [], "of role 'assistant'"),
    "system alone": ([{"role": "system", "content": "Be brief."}], [], "of role 'system'"),
    "half a character": (user(text("\ud800")), [], "the text of a user message has no valid character at position"),
    "a special token": (user(text("<|eot_id|>")), [], "contains the special token <|eot_id|>"),
    "a special token in an answer": (
        [*user_turn("Hi"), {"role": "assistant", "content": "<|image|>"}, *user_turn("Hi")],
        [],
        "contains the special token <|image|>",
    ),
    "a special token of two parts": (user(text("<|eot"), text("_id|>")), [], "the special token <|eot_id|>"),
    "system beside an image": (
        [{"role": "system", "content": "Be brief."}, *user({"type": "image", "url": "a"}, text("Hi"))],
        [],
        "a system message cannot go with an image",
    ),
}


@pytest.mark.parametrize("around", [("", ""), ("Look: ", " Think.")], ids=["plain", "around"])
@pytest.mark.parametrize("name", MISTAKES)
def test_messages_that_are_none(processor: Processor, name: str, around: tuple) -> None:
    messages, images, said = MISTAKES[name]
    with pytest.raises(UserError) as mistake:
        processor.prompt(read_conversation(messages, images).asked(*around))
    assert said in str(mistake.value) and "\n" not in str(mistake.value)


def test_messages_of_a_file(tmp_path: Path, images: dict) -> None:
    path, (messages, beside) = tmp_path / "messages.json", bare(CONVERSATIONS["earlier turns"], images)
    inside = located(CONVERSATIONS["earlier turns"], images)
    path.write_text(json.dumps(inside))
    question = read_messages(str(path), [])
    path.write_text(json.dumps(messages))
    assert read_messages(str(path), beside) == question
    assert question.sources == question.images == [str(images["square"]), str(images["tall"])]
    assert question.question == "And is it like  this one?" and question.asked == messages


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "is not JSON"),
        ("3", "a message must be a mapping"),
        ("{}", 'must have "role"'),
        ("[]", "there are no messages"),
        ('[{"role": "user", "content": [{"type": "image", "url": 3}]}]', "an image of a message is 3; it must be"),
        ('[{"role": "user", "content": [{"type": "image", "url": "no.png"}]}]', "no.png"),
        ('[{"role": "user", "content": [{"type": "image", "url": "https://a.b/c.png"}]}]', "https"),
    ],
)
def test_a_file_of_messages_that_cannot_be_used(tmp_path: Path, processor: Processor, content: str, said: str) -> None:
    path = tmp_path / "messages.json"
    path.write_text(content)
    with pytest.raises(UserError) as mistake:
        processor.prompt(read_messages(str(path), []).messages)
    assert said in str(mistake.value) and "\n" not in str(mistake.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.json"):
        read_messages(str(tmp_path / "no.json"), [])
    with pytest.raises(UserError, match="can be read once"):
        read_messages("-", ["-"])
