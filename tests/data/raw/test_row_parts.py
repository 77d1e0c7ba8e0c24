"""Tests that a row's images and turns are found in every usual form, and that nothing of them is left out unsaid."""

import re
from typing import Any

import pytest

from llava_cot_jax.data.raw.row_parts import conversations_of, paths_of


@pytest.mark.parametrize(
    ("row", "paths"),
    [
        ({"image": "a.png"}, ["a.png"]),
        ({"image": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        ({"images": "a.png"}, ["a.png"]),
        ({"image": None, "images": ["a.png"]}, ["a.png"]),
        ({"image": "a.png", "images": []}, ["a.png"]),
        ({"image": "b.png", "images": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        ({"image": None}, []),
        ({"image": "", "images": []}, []),
        ({"source": "coco", "image_size": [640, 480], "image_path": None, "url": "https://example.org/a.png"}, []),
    ],
)
def test_images(row: dict[str, Any], paths: list[str]) -> None:
    assert paths_of(row) == paths


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": 0}, "its image is 0, neither a path nor a list of paths"),
        ({"image": False}, "its image is False, neither"),
        ({"image": float("nan")}, "its image is nan, neither"),
        ({"image": {"path": "a.png"}}, "its image is {'path': 'a.png'}, a dict, neither"),
        ({"images": [["a.png"]]}, "its images is [['a.png']], a list, neither"),
        ({"images": ["a.png", None]}, "its images is ['a.png', None], a list, neither"),
        ({"image": "a.png", "images": ["b.png"]}, "its image is 'a.png', but its images are ['b.png'], a list"),
        (
            {"image": "data:image/png;base64,iVBO"},
            "its image is no path, but a text of 26 characters, perhaps the image",
        ),
        ({"image": "iVBO" * 1000}, "its image is no path, but a text of 4000 characters, perhaps the image itself"),
        ({"image_path": "a.png"}, "it has a file under image_path, but none under image or images"),
        ({"image": None, "img": ["a.JPG"]}, "it has a file under img, but none"),
        ({"Image": "a.webp"}, "it has a file under Image, but none"),
        ({"video": "a.mp4"}, "it has a file under video, but none"),
    ],
)
def test_images_that_cannot_be_told(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        paths_of(row)


TALK = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def said(names: tuple[str, ...], speaker: str = "from", text: str = "value") -> list[dict[str, str]]:
    return [{speaker: name, text: words} for name, words in zip(names, "sqa", strict=True)]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": TALK},
        {"messages": TALK},
        {"conversations": said(("System", "Human", "GPT"))},
        {"conversations": said(("system", "user", "assistant"))},
        {"messages": said(("system", "user", "assistant"), "role", "content")},
    ],
)
def test_turns(row: dict[str, Any]) -> None:
    assert conversations_of(row) == TALK


def test_turns_in_no_known_form_stay() -> None:
    odd = ["q", {"role": "user"}, {"from": "tool", "value": "x"}, {"from": 3, "value": None}, {}]
    assert conversations_of({"conversations": odd}) == odd
