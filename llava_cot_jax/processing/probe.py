"""The probe of the verifier: what follows a candidate in the conversation, after which yes or no is read.

The search reads the probability of yes after it, and training fits this probability to the values of candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import yaml

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import short_digest
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

MARK = "\ue000"
"""Character that stands for a placeholder in the chat template. It is of Unicode's private use area."""

Prompts = TypeVar("Prompts")


@dataclass(frozen=True)
class Probe:
    """Question of the verifier about the answer before it, and what may be said to it.

    Attributes:
        question: What the user asks.
        stem: Beginning of the assistant's reply.
        answers: The two texts that may follow the stem: that the answer is right, and that it is not.
    """

    question: str
    stem: str
    answers: tuple[str, str]

    def text(self, processor: "Processor") -> str:
        """Return the text after an answer, in the model's chat format.

        It is the end of the assistant's turn, the user's question, and the beginning of the reply.
        """
        answer = {"role": "assistant", "content": [{"type": "text", "text": MARK}]}
        conversation = processor.prompt([user_message("?"), answer, user_message(self.question)])
        return conversation.partition(MARK)[2] + self.stem

    def answer_ids(self, processor: "Processor") -> list[int]:
        """Return the token of each of the two answers after the stem.

        Raises:
            UserError: An answer is not the natural next token after it.
        """
        return natural_tokens(
            processor,
            self.text(processor),
            self.answers,
            f"after the verifier's stem {self.stem!r} the answer",
            'let the stem end with a colon and the answers begin with a space, as in "Answer:" and " yes"',
        )


@dataclass(frozen=True)
class ProbePrompt:
    """Question of the verifier about a candidate of each stage.

    Attributes:
        questions: Question about a candidate of each stage.
        stem: Beginning of the answer.
        answers: The two texts that may follow the stem: that the candidate is right, and that it is not.
    """

    questions: Mapping[str, str]
    stem: str
    answers: tuple[str, str]

    @classmethod
    def load(cls, path: str | Path = DEFAULT_JUDGE_PROMPTS) -> Self:
        """Read the verifier's question from a file of prompts.

        Raises:
            UserError: The file does not exist or is no YAML, or a key is missing or has a value that cannot be used.
        """
        return read_prompts(path, lambda content: cls.from_dict(content["probe"]))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Return the prompt that the key ``probe`` of a file of prompts holds.

        Raises:
            UserError: A text cannot be used.
        """
        check_names("probe.questions", content["questions"])
        return cls(
            questions={
                str(stage): without_mark(f"probe.questions.{stage}", str(text))
                for stage, text in content["questions"].items()
            },
            stem=str(content["stem"]),
            answers=two_texts("probe.answers", content["answers"]),
        )

    @property
    def digest(self) -> str:
        """Digest by which an adapter that was trained for this question is known."""
        return short_digest(repr((sorted(self.questions.items()), self.stem, self.answers)).encode())

    def of(self, stage: str) -> Probe:
        """Return the probe after a candidate of a stage."""
        return Probe(for_stage(self.questions, stage), self.stem, self.answers)


def read_prompts(path: str | Path, read: Callable[[Mapping[str, Any]], Prompts]) -> Prompts:
    """Read a file of prompts.

    Args:
        path: YAML file in the form of ``DEFAULT_JUDGE_PROMPTS``, which explains its keys.
        read: Function that makes the result of the content of the file.

    Raises:
        UserError: The file does not exist or is no YAML, or a key is missing or has a value that cannot be used.
    """
    path = as_path(path)
    with reading_errors(path):
        content = path.read_bytes()
    try:
        return read(yaml.safe_load(content.decode()))
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


def for_stage(texts: Mapping[str, str], stage: str) -> str:
    """Return the one of ``texts`` that is for a stage; a first sentence has that of any sentence."""
    return texts.get(SENTENCE if stage == FIRST_SENTENCE else stage, texts["other"])


def check_names(key: str, texts: Mapping[str, Any]) -> None:
    """Check that the texts by stage under a key have one for whole answers, and one for all stages without their own.

    Raises:
        UserError: One is missing.
    """
    for name in (WHOLE_ANSWER, "other"):
        if name not in texts:
            raise UserError(f"{key} lack {name}")


def without_mark(key: str, text: str) -> str:
    """Return the text of a key, which must not have ``MARK``.

    Raises:
        UserError: It has.
    """
    if MARK in text:
        raise UserError(f"{key} has the character U+{ord(MARK):X}, which is used as a mark")
    return text


def two_texts(key: str, values: Sequence[str]) -> tuple[str, str]:
    """Return the values of a key, which must be two different texts.

    Raises:
        UserError: They are not.
    """
    texts = tuple(map(str, values))
    if len(texts) != 2 or not all(texts) or texts[0] == texts[1]:
        raise UserError(f"{key} must be two different texts")
    return texts[0], texts[1]


def natural_tokens(processor: "Processor", text: str, endings: Sequence[str], what: str, remedy: str) -> list[int]:
    """Return the token of each of ``endings`` after ``text``.

    Raises:
        UserError: An ending is not one token, or changes the tokens of the text before it. The error is made of
            ``what`` and ``remedy``.
    """
    before = token_ids(processor, text)
    found = []
    for ending in endings:
        *same, last = token_ids(processor, text + ending)
        if same != before:
            raise UserError(f"{what} {ending!r} is not one natural next token: {remedy}")
        found.append(last)
    return found


def token_ids(processor: "Processor", text: str) -> list[int]:
    """Return the token ids of a text, with special tokens recognised and none added."""
    return processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
