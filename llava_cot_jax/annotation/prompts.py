"""Words by which an endpoint is asked for staged answers, and whether a conclusion is right, read from a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llava_cot_jax.annotation.rows import TurnToAnnotate
from llava_cot_jax.checks import check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.option_errors import parse_configuration
from llava_cot_jax.paths import as_path, reading_errors

DEFAULT_ANNOTATION_PROMPTS = Path(__file__).with_name("prompts.yaml")

VERDICTS = ("same", "different", "refusal")
"""Verdicts on a conclusion."""

_TEXTS: dict[str, tuple[str, ...]] = {
    "system": (),
    "ask": ("question", "answer", "hint"),
    "hint": ("text",),
    "retry": ("problem",),
    "check": ("question", "answer", "conclusion"),
}
"""Placeholders that each text must have."""


@dataclass(frozen=True)
class AnnotationPrompts:
    """Contents of a file of prompts. ``prompts.yaml`` explains its keys.

    Attributes:
        texts: Texts by their keys.
        verdicts: First word of the reply to ``check``, in lower case, by the verdict that it stands for.
    """

    texts: Mapping[str, str]
    verdicts: Mapping[str, str]

    @classmethod
    def load(cls, path: str | Path = DEFAULT_ANNOTATION_PROMPTS) -> Self:
        """Read a file of prompts.

        Raises:
            UserError: The file cannot be read or is no YAML, or a key is missing, unknown, or has no such text.
        """
        path = as_path(path)
        with reading_errors(path):
            content = path.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError as fault:
            raise UserError(f"{path} is no text in UTF-8: {fault}") from None
        given = parse_configuration(text, str(path))
        try:
            return cls(_texts(given), _verdicts(given.get("verdicts")))
        except UserError as fault:
            raise UserError(f"{path}: {fault}; compare it with {DEFAULT_ANNOTATION_PROMPTS}") from None

    def ask(self, question: str, turn: TurnToAnnotate) -> str:
        """Return the request for an answer in four sections.

        Args:
            question: Text of the question without markers of images.
            turn: The question's turn.
        """
        hint = _filled(self.texts["hint"], text=turn.hint) if turn.hint.strip() else ""
        return _filled(self.texts["ask"], question=question, answer=_joined(turn), hint=hint)

    def retry(self, problem: str) -> str:
        """Return what is said after a reply that cannot be used."""
        return _filled(self.texts["retry"], problem=problem)

    def check(self, question: str, turn: TurnToAnnotate, conclusion: str) -> str:
        """Return the question whether a conclusion means the same as the standard answer."""
        return _filled(self.texts["check"], question=question, answer=_joined(turn), conclusion=conclusion)


def _joined(turn: TurnToAnnotate) -> str:
    return " or ".join(map(str, turn.answers))


def _filled(template: str, **values: str) -> str:
    """Return a text with values in the places of its placeholders. Braces in a value stay as they are."""
    parts = [template]
    for name, value in values.items():
        parts = [piece for part in parts for piece in _split(part, f"{{{name}}}", value)]
    return "".join(parts)


class _Value(str):
    """Text in the place of a placeholder, in which no further one is sought."""


def _split(part: str, placeholder: str, value: str) -> list[str]:
    if isinstance(part, _Value):
        return [part]
    first, *others = part.split(placeholder)
    return [first, *(piece for other in others for piece in (_Value(value), other))]


def _texts(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of a file.

    Raises:
        UserError: One is missing or has not its placeholders, or there is another key.
    """
    if unknown := sorted(map(str, set(given) - {*_TEXTS, "verdicts"})):
        raise UserError(f"there is no key {unknown[0]}")
    for key, placeholders in _TEXTS.items():
        text = given.get(key)
        check_text(key, text)
        for name in placeholders:
            if f"{{{name}}}" not in str(text):
                raise UserError(f"{key} must have {{{name}}}")
    return {key: str(given[key]) for key in _TEXTS}


def _verdicts(given: Any) -> dict[str, str]:
    """Return the first words of verdicts.

    Raises:
        UserError: They are not one different word for each verdict.
    """
    words = [given.get(verdict) for verdict in VERDICTS] if isinstance(given, Mapping) else []
    is_right = len(words) == len(VERDICTS) and all(isinstance(word, str) and word.isalpha() for word in words)
    folded = [str(word).casefold() for word in words]
    if not is_right or len(set(folded)) < len(words):
        raise UserError(f"verdicts are {shown(given)}; they must be one word each for {', '.join(VERDICTS)}, in quotes")
    return dict(zip(VERDICTS, folded, strict=True))
