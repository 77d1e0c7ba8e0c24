"""Parts of a row of annotations: its images, and its turns in LLaVA's form, whichever of the usual forms it has."""

import re
from collections.abc import Mapping
from typing import Any

from llava_cot_jax.checks import shown

IMAGE_KEYS = ("image", "images")
TURN_KEYS = ("conversations", "messages")

_SPEAKERS = {"user": "human", "assistant": "gpt"}
"""Names of LLaVA's form by those of chat APIs."""

_LONGEST_PATH = 1024

_MEDIA_KEY = re.compile(r"image|img|picture|photo|figure|video|file|path", re.IGNORECASE)
_MEDIA_FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic|mp4|avi|mov|mkv|webm)$", re.IGNORECASE)


def paths_of(row: Mapping[str, Any]) -> list[str]:
    """Return the paths of a row's images, which it has as one text or a list, under ``image`` or ``images``.

    Raises:
        ValueError: They are something else, or stand under another key.
    """
    given = {key: row[key] for key in reversed(IMAGE_KEYS) if row.get(key) not in (None, "", [])}
    if not given and (other := next((key for key in row if _names_a_file(key, row[key])), None)):
        raise ValueError(f"it has a file under {other}, but none under image or images")
    found: list[list[str]] = []
    for key, value in given.items():
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
            raise ValueError(f"its {key} is {shown(value)}, neither a path nor a list of paths")
        if longest := next((path for path in paths if path.startswith("data:") or len(path) > _LONGEST_PATH), None):
            raise ValueError(
                f"its {key} is no path, but a text of {len(longest)} characters, perhaps the image itself: write it "
                "to a file, and name that"
            )
        found.append(paths)
    if len(found) == 2 and not set(found[1]) <= set(found[0]):
        raise ValueError(f"its image is {shown(given['image'])}, but its images are {shown(given['images'])}")
    return found[0] if found else []


def _names_a_file(key: str, value: Any) -> bool:
    """Whether an entry of a row names an image or a video, as far as its key and the end of the name tell."""
    names = value if isinstance(value, list) else [value]
    known = key in IMAGE_KEYS or not _MEDIA_KEY.search(key)
    return not known and any(isinstance(name, str) and _MEDIA_FILE.search(name) for name in names)


def conversations_of(row: Mapping[str, Any]) -> list[Any]:
    """Return the turns of a row in LLaVA's form, ``{"from": ..., "value": ...}``.

    Messages of chat APIs, with ``role`` and ``content``, are given that form. What is in neither form stays as it is.

    Raises:
        ValueError: The row has no list of turns.
    """
    if not (keys := [key for key in TURN_KEYS if key in row]):
        raise ValueError(f"it has no list under conversations, only {', '.join(row) or 'nothing'}")
    turns = row[keys[0]]
    if not isinstance(turns, list):
        raise ValueError(f"its {keys[0]} are {shown(turns)}, not a list of turns")
    return [_in_llava_form(turn) for turn in turns]


def _in_llava_form(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    speaker, value = ("from", "value") if "from" in turn else ("role", "content") if "role" in turn else (None, None)
    if speaker is None or value not in turn:
        return turn
    name = turn[speaker]
    lower = name.lower() if isinstance(name, str) else name
    known = _SPEAKERS.get(lower, lower) if isinstance(lower, str) else lower
    return {"from": known if known in ("human", "gpt", "system") else name, "value": turn[value]}
