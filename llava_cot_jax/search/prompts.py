"""Prompts of the judge and the verifier: read from a file, put into the model's chat format, and split into texts.

A prompt of the judge is one user turn and the beginning of an answer. Its prefix, up to the first candidate, is the
same for all prompts of a kind in a stage, and is prefilled once:

    chat header | intro | question | middle | earlier stages | label |   first | between | second | ending
    ---------------------------- shared prefix ----------------------   ------------ suffix ------------

A check shows one candidate, so it lacks ``between`` and ``second``. The verifier's is what follows a candidate in the
conversation itself: the end of its turn, a question of the user, and the beginning of the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava_cot_jax.errors import UserError
from llava_cot_jax.processing.messages import user_message
from llava_cot_jax.processing.probe import (
    DEFAULT_JUDGE_PROMPTS,
    MARK,
    SENTENCE,
    ProbePrompt,
    check_names,
    for_stage,
    read_prompts,
    two_texts,
    without_mark,
)

if TYPE_CHECKING:
    from llava_cot_jax.processing.processor import Processor

PromptKind = Literal["pair", "check"]
"""Kind of a prompt: about a pair of candidates, or a check of one."""

PROMPT_KINDS: tuple[PromptKind, PromptKind] = ("pair", "check")
"""The kinds of prompts, in the order of all tables of prompts."""

PLACEHOLDERS: dict[PromptKind, tuple[str, ...]] = {
    "pair": ("question", "earlier", "first", "second"),
    "check": ("question", "earlier", "first"),
}
"""Placeholders of each kind of prompt, in order. ``{criterion}`` may stand anywhere besides."""


@dataclass(frozen=True)
class JudgePrompts:
    """Contents of a file of prompts. ``judge_prompts.yaml`` explains its keys.

    Attributes:
        text: Text of each kind of prompt.
        readings: The two endings of a written verdict of each kind: for response 1 or 2; correct or incorrect.
        stem: Beginning of the verdict on a pair.
        verdicts: The two texts that may follow the stem.
        criteria: Criterion of each stage.
        earlier: Words before the earlier stages.
        shows: Earlier stages that the judge of a stage is shown.
        checked: Stages whose candidates are checked.
        probe: Question of the verifier.
    """

    text: Mapping[PromptKind, str]
    readings: Mapping[PromptKind, tuple[str, str]]
    stem: str
    verdicts: tuple[str, str]
    criteria: Mapping[str, str]
    earlier: str
    shows: Mapping[str, tuple[str, ...]]
    checked: tuple[str, ...]
    probe: ProbePrompt

    @classmethod
    def load(cls, path: str | Path = DEFAULT_JUDGE_PROMPTS) -> "JudgePrompts":
        """Read a file of prompts.

        Raises:
            UserError: The file does not exist or is no YAML, or a key is missing or has a value that cannot be used.
        """
        return read_prompts(path, cls._from_dict)

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any]) -> "JudgePrompts":
        for kind in PROMPT_KINDS:
            _check_placeholders(kind, content[kind]["text"])
        check_names("criteria", content["criteria"])
        return cls(
            text={kind: str(content[kind]["text"]) for kind in PROMPT_KINDS},
            readings={kind: two_texts(f"{kind}.readings", content[kind]["readings"]) for kind in PROMPT_KINDS},
            stem=str(content["pair"]["stem"]),
            verdicts=two_texts("pair.verdicts", content["pair"]["verdicts"]),
            criteria={str(stage): str(text) for stage, text in content["criteria"].items()},
            earlier=str(content["earlier"]),
            shows={str(stage): tuple(map(str, shown)) for stage, shown in content["shows"].items()},
            checked=tuple(map(str, content["check"]["stages"])),
            probe=ProbePrompt.from_dict(content["probe"]),
        )

    def shown_stages(self, stage: str, stages: Sequence[str]) -> list[str]:
        """Return those of ``stages`` before ``stage`` that its judge is shown."""
        before = stages[: stages.index(stage)] if stage in stages else ()
        return [earlier for earlier in before if earlier in self.shows.get(stage, ()) or stage == SENTENCE]

    def split(
        self, processor: "Processor", kind: PromptKind, stage: str, stages: Sequence[str], images: int
    ) -> list[str]:
        """Return the texts between the placeholders of a prompt in the model's chat format.

        The chat header, up to the user's words, is the first text.

        Args:
            processor: Processor whose chat format is used.
            kind: Kind of the prompt.
            stage: Stage whose candidates are judged.
            stages: All stages of the search in order.
            images: Number of images in the chat header.
        """
        text = self.text[kind].replace("{criterion}", for_stage(self.criteria, stage))
        text = text.replace("{earlier}", (self.earlier if self.shown_stages(stage, stages) else "") + MARK)
        for name in PLACEHOLDERS[kind]:
            text = text.replace(f"{{{name}}}", MARK)
        prompt = processor.prompt([user_message(MARK + text, images=images)])
        return prompt.split(MARK)


def _check_placeholders(kind: PromptKind, text: str) -> None:
    """Check that a prompt has each placeholder once, and in order."""
    placeholders = [f"{{{name}}}" for name in PLACEHOLDERS[kind]]
    places = [text.find(placeholder) for placeholder in placeholders]
    if places != sorted(places) or any(text.count(placeholder) != 1 for placeholder in placeholders):
        raise UserError(f"{kind}.text must have {', '.join(placeholders)}, each once and in this order")
    without_mark(f"{kind}.text", text)
