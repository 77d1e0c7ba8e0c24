"""The judge's prompts: read from a file, put into the model's chat format, cut into token pieces.

A prompt is one user turn and the beginning of an answer. Its front, up to the first candidate, is the same
for all rows of a stage; a row is the rest:

    lead | intro | question | middle | earlier stages | label |   first | between | second | ending
    ------------------- front, read once ---------------------   ------------ row -------------
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import access, as_path
from llava_cot_jax.processing.messages import user_turn

if TYPE_CHECKING:
    from llava_cot_jax.processing.processor import Processor

DEFAULT_FILE = Path(__file__).with_name("judge_prompts.yaml")

WHOLE_ANSWER = "whole"
"""What stands for a stage where whole answers are judged."""

PromptKind = Literal["pair", "check"]
PROMPT_KINDS: tuple[PromptKind, PromptKind] = ("pair", "check")

PLACEHOLDERS: dict[PromptKind, tuple[str, ...]] = {
    "pair": ("question", "earlier", "first", "second"),
    "check": ("question", "earlier", "first"),
}
"""What a prompt leaves open, in order; ``{criterion}`` may stand anywhere."""

MARK = "\ue000"
"""Stands for a hole while a prompt goes through the chat template: a character that no text has."""


@dataclass(frozen=True)
class JudgePrompts:
    """What the file says; ``judge_prompts.yaml`` explains each.

    Attributes:
        text: of each kind of prompt.
        readings: what a written verdict says, of each kind: response 1 or 2; correct or incorrect.
        stem: the beginning of a pair's verdict.
        verdicts: the two texts that may come next.
        criteria: by stage.
        earlier: the words before earlier stages.
        shows: the earlier stages shown to the judge of a stage.
        checked: the stages whose candidates are checked.
    """

    text: Mapping[PromptKind, str]
    readings: Mapping[PromptKind, tuple[str, str]]
    stem: str
    verdicts: tuple[str, str]
    criteria: Mapping[str, str]
    earlier: str
    shows: Mapping[str, tuple[str, ...]]
    checked: tuple[str, ...]

    @classmethod
    def load(cls, path: str | Path = DEFAULT_FILE) -> "JudgePrompts":
        """Read a file of prompts.

        Raises:
            UserError: no such file, no YAML, or something in it that is missing or cannot be used.
        """
        path = as_path(path)
        with access(path):
            content = path.read_bytes()
        try:
            return cls._from(yaml.safe_load(content.decode()))
        except yaml.YAMLError as fault:
            raise UserError(f"{path} is not YAML: {' '.join(str(fault).split())}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise UserError(f"{path}: {fault!r}; compare it with {DEFAULT_FILE}") from None
        except UserError as fault:
            raise UserError(f"{path}: {fault}") from None

    @classmethod
    def _from(cls, said: Mapping[str, Any]) -> "JudgePrompts":
        for kind in PROMPT_KINDS:
            _check_holes(kind, said[kind]["text"])
        for name in (WHOLE_ANSWER, "other"):
            if name not in said["criteria"]:
                raise UserError(f"criteria lack {name}")
        return cls(
            text={kind: str(said[kind]["text"]) for kind in PROMPT_KINDS},
            readings={kind: _two(f"{kind}.readings", said[kind]["readings"]) for kind in PROMPT_KINDS},
            stem=str(said["pair"]["stem"]),
            verdicts=_two("pair.verdicts", said["pair"]["verdicts"]),
            criteria={str(stage): str(text) for stage, text in said["criteria"].items()},
            earlier=str(said["earlier"]),
            shows={str(stage): tuple(map(str, shown)) for stage, shown in said["shows"].items()},
            checked=tuple(map(str, said["check"]["stages"])),
        )

    def shown(self, stage: str, stages: Sequence[str]) -> list[str]:
        """Which of ``stages`` the judge of ``stage`` is shown: those before it alone."""
        before = stages[: stages.index(stage)] if stage in stages else ()
        return [earlier for earlier in before if earlier in self.shows.get(stage, ())]

    def cut(self, processor: "Processor", kind: PromptKind, stage: str, stages: Sequence[str], images: int) -> list[str]:
        """The texts between the holes of a prompt in the model's chat format, from the lead on: one more than holes.

        What comes first, up to the user's words, is a text of its own.
        """
        text = self.text[kind].replace("{criterion}", self.criteria.get(stage, self.criteria["other"]))
        text = text.replace("{earlier}", (self.earlier if self.shown(stage, stages) else "") + MARK)
        for hole in PLACEHOLDERS[kind]:
            text = text.replace(f"{{{hole}}}", MARK)
        prompt = processor.prompt(user_turn(MARK + text, images=images))
        return prompt.split(MARK)


def _check_holes(kind: PromptKind, text: str) -> None:
    """Each hole once and in order."""
    places = [text.find(f"{{{hole}}}") for hole in PLACEHOLDERS[kind]]
    if min(places) < 0 or places != sorted(places) or any(text.count(f"{{{hole}}}") > 1 for hole in PLACEHOLDERS[kind]):
        wanted = ", ".join(f"{{{hole}}}" for hole in PLACEHOLDERS[kind])
        raise UserError(f"{kind}.text must have {wanted}, each once and in this order")
    if MARK in text:
        raise UserError(f"{kind}.text has the character U+{ord(MARK):X}, which is used as a mark")


def _two(name: str, values: Sequence[str]) -> tuple[str, str]:
    texts = tuple(map(str, values))
    if len(texts) != 2 or not all(texts) or texts[0] == texts[1]:
        raise UserError(f"{name} must be two different texts")
    return texts[0], texts[1]
