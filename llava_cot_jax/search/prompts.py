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

import yaml

from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import as_path, reading_errors
from llava_cot_jax.processing.messages import user_message

if TYPE_CHECKING:
    from llava_cot_jax.processing.processor import Processor

DEFAULT_JUDGE_PROMPTS = Path(__file__).with_name("judge_prompts.yaml")

WHOLE_ANSWER = "whole"
"""Name that stands for a stage where answers are sampled whole."""

FIRST_SENTENCE, SENTENCE = "first sentence", "sentence"
"""Names that stand for a stage where answers are sampled sentence by sentence: the prompts for a later sentence show
the answer so far in the place of the first one."""

PromptKind = Literal["pair", "check"]
"""Kind of a prompt: about a pair of candidates, or a check of one."""

PROMPT_KINDS: tuple[PromptKind, PromptKind] = ("pair", "check")
"""The kinds of prompts, in the order of all tables of prompts."""

PLACEHOLDERS: dict[PromptKind, tuple[str, ...]] = {
    "pair": ("question", "earlier", "first", "second"),
    "check": ("question", "earlier", "first"),
}
"""Placeholders of each kind of prompt, in order. ``{criterion}`` may stand anywhere besides."""

_MARK = "\ue000"
"""Character that stands for a placeholder in the chat template. It is of Unicode's private use area."""


@dataclass(frozen=True)
class ProbePrompt:
    """Question of the verifier about the candidate before it.

    Attributes:
        questions: Question about a candidate of each stage.
        stem: Beginning of the answer.
        answers: The two texts that may follow the stem: that the candidate is right, and that it is not.
    """

    questions: Mapping[str, str]
    stem: str
    answers: tuple[str, str]


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
        path = as_path(path)
        with reading_errors(path):
            content = path.read_bytes()
        try:
            return cls._from_dict(yaml.safe_load(content.decode()))
        except yaml.YAMLError as fault:
            raise UserError(f"{path} is not YAML: {' '.join(str(fault).split())}") from None
        except UserError as fault:
            raise UserError(f"{path}: {fault}") from None
        except UnicodeDecodeError as fault:
            raise UserError(f"{path} is no text in UTF-8: {fault}") from None
        except KeyError as missing:
            raise UserError(f"{path} lacks {missing}; compare it with {DEFAULT_JUDGE_PROMPTS}") from None
        except (TypeError, ValueError, AttributeError):
            raise UserError(
                f"{path} has another form than a file of prompts: compare it with {DEFAULT_JUDGE_PROMPTS}"
            ) from None

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any]) -> "JudgePrompts":
        for kind in PROMPT_KINDS:
            _check_placeholders(kind, content[kind]["text"])
        for key, stages in (("criteria", content["criteria"]), ("probe.questions", content["probe"]["questions"])):
            for name in (WHOLE_ANSWER, "other"):
                if name not in stages:
                    raise UserError(f"{key} lack {name}")
        return cls(
            text={kind: str(content[kind]["text"]) for kind in PROMPT_KINDS},
            readings={kind: _two_texts(f"{kind}.readings", content[kind]["readings"]) for kind in PROMPT_KINDS},
            stem=str(content["pair"]["stem"]),
            verdicts=_two_texts("pair.verdicts", content["pair"]["verdicts"]),
            criteria={str(stage): str(text) for stage, text in content["criteria"].items()},
            earlier=str(content["earlier"]),
            shows={str(stage): tuple(map(str, shown)) for stage, shown in content["shows"].items()},
            checked=tuple(map(str, content["check"]["stages"])),
            probe=ProbePrompt(
                questions={
                    str(stage): _without_mark(f"probe.questions.{stage}", str(text))
                    for stage, text in content["probe"]["questions"].items()
                },
                stem=str(content["probe"]["stem"]),
                answers=_two_texts("probe.answers", content["probe"]["answers"]),
            ),
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
        text = self.text[kind].replace("{criterion}", _for_stage(self.criteria, stage))
        text = text.replace("{earlier}", (self.earlier if self.shown_stages(stage, stages) else "") + _MARK)
        for name in PLACEHOLDERS[kind]:
            text = text.replace(f"{{{name}}}", _MARK)
        prompt = processor.prompt([user_message(_MARK + text, images=images)])
        return prompt.split(_MARK)

    def probe_text(self, processor: "Processor", stage: str) -> str:
        """Return the text of the verifier after a candidate of ``stage``, in the model's chat format.

        It is the end of the assistant's turn, the user's question, and the beginning of the answer.
        """
        question = _for_stage(self.probe.questions, stage)
        answer = {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}
        conversation = processor.prompt([user_message("?"), answer, user_message(question)])
        return conversation.partition(_MARK)[2] + self.probe.stem


def _for_stage(texts: Mapping[str, str], stage: str) -> str:
    """Return the one of ``texts`` that is for a stage; a first sentence has that of any sentence."""
    return texts.get(SENTENCE if stage == FIRST_SENTENCE else stage, texts["other"])


def _check_placeholders(kind: PromptKind, text: str) -> None:
    """Check that a prompt has each placeholder once, and in order."""
    placeholders = [f"{{{name}}}" for name in PLACEHOLDERS[kind]]
    places = [text.find(placeholder) for placeholder in placeholders]
    if places != sorted(places) or any(text.count(placeholder) != 1 for placeholder in placeholders):
        raise UserError(f"{kind}.text must have {', '.join(placeholders)}, each once and in this order")
    _without_mark(f"{kind}.text", text)


def _without_mark(name: str, text: str) -> str:
    """Return ``text`` of the key ``name``, which must not have the mark."""
    if _MARK in text:
        raise UserError(f"{name} has the character U+{ord(_MARK):X}, which is used as a mark")
    return text


def _two_texts(name: str, values: Sequence[str]) -> tuple[str, str]:
    """Return ``values`` of the key ``name``, which must be two different texts."""
    texts = tuple(map(str, values))
    if len(texts) != 2 or not all(texts) or texts[0] == texts[1]:
        raise UserError(f"{name} must be two different texts")
    return texts[0], texts[1]
