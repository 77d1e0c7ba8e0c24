"""Conventions: the implementations that weights may have been trained with, and how a checkpoint's is found."""

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

Convention = Literal["meta", "transformers_4", "transformers_5"]
"""Implementation that the parameters were trained with, one of three.

==================  =======================  ==================================================
convention          a vision tap is          a text token that sees no image
==================  =======================  ==================================================
``meta``            the layer's input        gets nothing from a cross-attention layer
``transformers_4``  the layer's input        attends to every image token, but gets nothing from the MLP
``transformers_5``  the layer's output       as ``transformers_4``
==================  =======================  ==================================================

``meta`` is Meta's llama-models, with which the released weights were trained; ``transformers_4``
is transformers 4.45 to 4.54, with which LLaVA-CoT's were tuned; ``transformers_5`` is transformers
4.56 and later.
"""


def find_convention(published: Mapping[str, Any]) -> tuple[Convention, str]:
    """Return the convention that the weights beside a config.json were probably trained with, and what that rests on.

    A convention that the file states counts, unless a version of transformers that computes otherwise has saved the
    file: transformers keeps the statement, though it may have tuned the weights. A file that states none has the
    convention of the version that saved it, and ``meta`` where that cannot be told.

    Returns:
        The convention, and the end of a sentence about config.json that says why it is only assumed; nothing where the
        file states it.
    """
    stated, version = published.get("convention"), str(published.get("transformers_version", ""))
    saver = None if _is_as_released(published) else _convention_of_transformers(version)
    if stated is not None and (saver in (None, stated) or stated not in get_args(Convention)):
        return stated, ""
    if saver is None:
        known = "states none"
        if version:
            meaning = "the version of Meta's released files" if _is_as_released(published) else "an unknown version"
            known = f"has {meaning}, {version}"
        return "meta", f"{known}, and nothing tells of another training"
    statement = "states none" if stated is None else f"states {stated!r}"
    return saver, f"{statement}, but transformers {version} saved it and may have tuned the weights"


def _is_as_released(published: Mapping[str, Any]) -> bool:
    """Whether a config.json may be Meta's own. transformers adds a name when it saves one that it has read."""
    return published.get("transformers_version") == "4.45.0.dev0" and not published.get("_name_or_path")


def _convention_of_transformers(version: str) -> Convention | None:
    """Return the convention that a version of transformers computes; None if it is unknown."""
    if not (release := re.match(r"(\d+)\.(\d+)", version)):
        return None
    return "transformers_4" if (int(release[1]), int(release[2])) < (4, 56) else "transformers_5"
