"""Rows that teach a verifier: candidates of searches, each with its value, which ``llava-cot rollout`` has written.

A value is the share of right conclusions among the continuations of a candidate. One line of ``values.jsonl`` has a
question, the candidates of each stage of its search, and whole answers, which are right or wrong.

What a verifier is for is the choice among candidates of the same question. So candidates of the same text are one,
whose value is the mean of theirs, and a stage of which all texts have the same value is left out; so is a question that
is always right, or always wrong. Of the others, the better candidates of a stage (those of at least its mean value)
weigh as much as the worse. A stage of a question weighs by how far the means of the two are apart, as values of few
continuations differ by chance, and all of these weights of a stage add up to the same for each stage, whichever has the
more differences to show, unless the stage has so few texts that each would weigh more than ``MOST_WEIGHT`` on average.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from llava_cot_jax.data.rows import ProbeTarget, Row, Turn
from llava_cot_jax.data.settings import Targets, VerifierSettings
from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import reading_errors
from llava_cot_jax.processing.messages import question_text
from llava_cot_jax.processing.probe import DEFAULT_JUDGE_PROMPTS, WHOLE_ANSWER, ProbePrompt
from llava_cot_jax.stage_format import StageFormat

VALIDATION_SHARE = 0.1
"""Share of the images whose questions are for validation, drawn by a hash of their bytes."""

MOST_WEIGHT = 4.0
"""Largest mean weight of the texts of a stage, before ``stage_weights``.

Without a bound, the few texts of a stage that hardly ever differs would weigh as much as thousands of others, and each
of them would be a batch of its own. With the bound w, the number of texts that have the same variance at equal weights
(Kish 1965: the square of the sum of weights over the sum of their squares) is by the balance of stages at least 1 / w
of all.
"""

READERS = 16
"""Number of images that are read at a time, since a bucket takes long to answer."""

VALUES_VERSION = 3
"""Version of the rows in their fingerprints, to be raised whenever the same file gives other rows."""


@dataclass(frozen=True)
class _Question:
    """Line of a file of values.

    Attributes:
        id: Name of the question.
        text: The question, without markers of images.
        asked: What the user says: the question with what the format of the answer puts around it.
        images: Files of its images, relative to the folder.
        groups: What the verifier is asked about, in groups to choose from: the candidates of each stage, and the whole
            answers.
    """

    id: str
    text: str
    asked: str
    images: tuple[str, ...]
    groups: tuple["_Group", ...]


@dataclass(frozen=True)
class _Group:
    """Different texts that begin the same and compete, with their values.

    Attributes:
        stage: Name of their stage, or "whole".
        before: Text of the answer before them.
        texts: The texts.
        values: Value of each, from 0 to 1: the mean over its candidates.
        after: Text after each, as the policy writes it before the next stage.
    """

    stage: str
    before: str
    texts: tuple[str, ...]
    values: tuple[float, ...]
    after: str

    def answer(self, index: int) -> str:
        """Return the answer as far as one of the texts goes."""
        return "\n\n".join([*filter(None, [self.before]), self.texts[index]]) + self.after


@dataclass(frozen=True)
class _Example:
    """Text that the verifier is asked about: its places in ``ValueRows``, its target, and its weight."""

    question: int
    group: int
    text: int
    target: float
    weight: float


class ValueRows:
    """``Rows`` of a file of values, one for each text that the verifier is asked about. They can be pickled.

    Questions whose images are in two splits are in neither. The rows are in an order that is drawn once, so that the
    first of them are a sample of all.

    Attributes:
        stages: Names of the stages of the file, in their order, with ``whole`` for whole answers.
        summary: Line that tells how many questions and texts there are, and what is left out.

    Args:
        file: File of values, beside the folder of its images, on a disk or in a bucket.
        split: ``train`` or ``validation``; or ``all``, which are both, for values that nothing is trained on.
        settings: Targets, weights of the stages, and the verifier's question.

    Raises:
        UserError: The split is unknown or has no texts to choose from, a line or an image is missing or damaged, a
            question is held back for measuring, or the file of prompts cannot be used.
    """

    def __init__(self, file: Path, split: str, settings: VerifierSettings) -> None:
        if split not in ("train", "validation", "all"):
            raise UserError(f"{file.parent} has no split {split!r}: its splits are train and validation")
        self._folder = file.parent
        self._prompt = ProbePrompt.load(settings.judge_prompts or DEFAULT_JUDGE_PROMPTS)
        with reading_errors(file):
            content = file.read_bytes()
        lines = list(_read_questions(file, content))
        questions = [question for question in lines if question is not None]
        self.stages = tuple(dict.fromkeys(group.stage for question in questions for group in question.groups))
        names = dict.fromkeys(name for question in questions for name in question.images)
        digests = _image_digests(self._folder, hashlib.sha256(content).hexdigest(), tuple(names))
        left_out = Counter({"questions without an answer": len(lines) - len(questions)})
        self._questions: list[_Question] = []
        for question in questions:
            without = {hashlib.sha256(repr(question.text).encode()).digest()}
            own = {digests[image] for image in question.images} or without
            splits = {_split_of(digest) for digest in own}
            if split != "all" and len(splits) > 1:
                left_out["questions with images of both splits"] += 1
            elif split != "all" and splits != {split}:
                continue
            elif not any(len(set(group.values)) > 1 for group in question.groups):
                left_out["questions with nothing to choose"] += 1
            else:
                self._questions.append(question)
        self._examples, left_out["stages with nothing to choose"] = _weigh(self._questions, settings)
        told = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        stages = Counter(self._group(example).stage for example in self._examples)
        counts = f" ({', '.join(f'{stage} {stages[stage]}' for stage in sorted(stages))})" if stages else ""
        self.summary = (
            f"{file.parent}, {split}: {len(self._examples)} texts of {len(self._questions)} questions to ask the "
            f"verifier about{counts}; left out: {told or 'nothing'}"
        )
        if not self._examples:
            raise UserError(
                f"{self.summary}: nothing is left to learn from; roll out more questions (a training may validate on "
                "none: eval_examples: 0)"
            )
        weights, asked = sorted(settings.stage_weights.items()), [question.asked for question in questions]
        decisive = repr((VALUES_VERSION, split, settings.targets, weights, self._prompt, asked))
        parts = (content, decisive.encode(), *(digests[image] for image in sorted(digests)))
        self._fingerprint = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hash of the file, of its images, of the split and of all settings that the rows depend on."""
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Row:
        """Read the row at ``index``; its images are the bytes of files.

        Raises:
            IndexError: There is no row at ``index``.
            UserError: A file is gone.
        """
        turns = self.turns(index)
        example = self._examples[index]
        question = self._questions[example.question]
        images = tuple(_read_image(self._folder / name) for name in question.images)
        return Row(f"{question.id}, {self._group(example).stage} {example.text + 1}", "values", images, turns)

    def turns(self, index: int) -> tuple[Turn, ...]:
        """Read the conversation of a row alone, without the cost of its images."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index} of {len(self)}")
        example = self._examples[index]
        question, group = self._questions[example.question], self._group(example)
        target = ProbeTarget(self._prompt.of(group.stage), example.target, example.weight)
        return (Turn(question.asked, group.answer(example.text), len(question.images), target=target),)

    def _group(self, example: _Example) -> _Group:
        """Return the texts among which that of an example is."""
        return self._questions[example.question].groups[example.group]


def _read_image(path: Path) -> bytes:
    with reading_errors(path):
        return path.read_bytes()


@lru_cache(maxsize=16)
def _image_digests(folder: Path, version: str, names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the SHA-256 of each image of a folder of values by its name.

    A process reads the images once for all splits, since that may take minutes in a bucket.

    Args:
        folder: Folder of values.
        version: Digest of its file of values. Images are read anew where it is another.
        names: Files of the images, relative to the folder.
    """
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(lambda name: hashlib.sha256(_read_image(folder / name)).digest(), names)
        return dict(zip(names, digests, strict=True))


def _read_questions(file: Path, content: bytes) -> Iterator[_Question | None]:
    """Read the lines of a file of values, where None is a question that could not be asked.

    Raises:
        UserError: A line is damaged or of a test set, or its format is not known here.
    """
    formats: dict[str, StageFormat] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield None if "error" in row else _question(row, formats)
        except UserError as fault:
            raise UserError(f"{file}, line {number}: {fault}") from None
        except (ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError) as fault:
            raise UserError(
                f"{file}, line {number} is damaged ({type(fault).__name__}: {fault}): let `llava-cot rollout` finish, "
                "or remove the line"
            ) from None


def _question(row: Mapping[str, Any], formats: dict[str, StageFormat]) -> _Question:
    """Return the question of a line. Candidates without a continuation have no value, and are left out.

    Args:
        row: Content of the line.
        formats: Formats of earlier lines by their names, to which that of the line is added.

    Raises:
        UserError: The line is of a test set, or its format is not known here.
    """
    if row.get("split") == "test":
        raise UserError("the question is of the split test, which is for measuring: roll out --split train to learn")
    groups: list[_Group] = []
    for number, stage in enumerate(row["stages"], 1):
        known = [(str(one["text"]), float(one["value"])) for one in stage["candidates"] if one["value"] is not None]
        # Every stage but the last is followed by a blank line, part of which may share a token with its end.
        after = "\n\n" if number < len(row["stages"]) else ""
        groups.append(_group(stage["stage"], stage["before"], known, after))
    whole = [(str(answer["text"]), float(answer["right"])) for answer in row["answers"]]
    groups.append(_group(WHOLE_ANSWER, "", whole, ""))
    images = tuple(map(str, row["images"]))
    text = question_text(row["question"], len(images))
    return _Question(str(row["id"]), text, asked_text(text, row["format"], formats), images, tuple(groups))


def asked_text(question: str, name: str, formats: dict[str, StageFormat]) -> str:
    """Return a question with what its format puts around it, as the model was asked.

    Args:
        question: The question.
        name: Name of its format, or the path of a file.
        formats: Formats that were loaded by their names, to which this one is added.

    Raises:
        UserError: The format is not known here.
    """
    if name not in formats:
        try:
            formats[name] = StageFormat.load(name)
        except UserError as fault:
            raise UserError(
                f"{fault}, so that what it puts around a question is not known: write the path of its YAML file in the "
                'place of its name under "format"'
            ) from None
    before, after = formats[name].around_question
    return f"{before}{question}{after}"


def _group(stage: str, before: str, known: Sequence[tuple[str, float]], after: str) -> _Group:
    if wrong := [value for _, value in known if not 0 <= value <= 1]:
        raise ValueError(f"a value is {wrong[0]}, not from 0 to 1")
    values: dict[str, list[float]] = {}
    for text, value in known:
        values.setdefault(text, []).append(value)
    return _Group(str(stage), str(before), tuple(values), tuple(map(fmean, values.values())), after)


def _split_of(digest: bytes) -> str:
    """Return the split of an image, from the hash of its bytes."""
    return "validation" if int.from_bytes(digest[:8]) < VALIDATION_SHARE * 2**64 else "train"


def _weigh(questions: Sequence[_Question], settings: VerifierSettings) -> tuple[list[_Example], int]:
    """Return the texts to ask about with their targets and weights, whose mean is 1.

    Returns:
        The examples, and the number of stages that are left out because all their texts have the same target.
    """
    places: list[tuple[int, int, int]] = []
    targets: list[float] = []
    weights: list[float] = []
    stages: list[str] = []
    same = 0
    for number, question in enumerate(questions):
        for index, group in enumerate(question.groups):
            wanted = _targets(group.values, settings.targets)
            if settings.stage_weights.get(group.stage, 1.0) == 0 or not len(wanted):
                continue
            better = wanted >= wanted.mean() - 1e-9
            if better.all():
                same += 1
                continue
            apart = wanted[better].mean() - wanted[~better].mean()
            places += [(number, index, text) for text in range(len(wanted))]
            targets += wanted.tolist()
            weights += (apart / np.where(better, better.sum(), (~better).sum())).tolist()
            stages += [group.stage] * len(wanted)
    totals = dict.fromkeys(stages, 0.0)
    for stage, weight in zip(stages, weights, strict=True):
        totals[stage] += weight
    balanced = _balance(Counter(stages))
    shares = [
        settings.stage_weights.get(stage, 1.0) * balanced[stage] * weight / totals[stage]
        for stage, weight in zip(stages, weights, strict=True)
    ]
    scale = len(shares) / sum(shares) if shares else 0.0
    examples = []
    for i in np.random.default_rng(0).permutation(len(places)).tolist():
        question, group, text = places[i]
        examples.append(_Example(question, group, text, targets[i], scale * shares[i]))
    return examples, same


def _balance(counts: Mapping[str, int]) -> dict[str, float]:
    """Return the weight of all texts of each stage: the same for each, but at most ``MOST_WEIGHT`` a text on average.

    Args:
        counts: Number of texts of each stage. It is the sum of the weights.
    """
    balanced, rest = {}, float(sum(counts.values()))
    for done, (stage, count) in enumerate(sorted(counts.items(), key=lambda each: each[1])):
        balanced[stage] = min(rest / (len(counts) - done), MOST_WEIGHT * count)
        rest -= balanced[stage]
    return balanced


def _targets(values: Sequence[float], kind: Targets) -> np.ndarray:
    """Return the probability of yes to train for each value, float64."""
    array = np.asarray(values, float)
    return array if kind == "soft" else (array >= 0.5).astype(float)
