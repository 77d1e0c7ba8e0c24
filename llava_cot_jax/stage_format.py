"""Format of a staged answer: what opens and closes each stage, and which stage is shown as the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations, permutations
from os import PathLike
from pathlib import Path
from typing import Any, Self

from llava_cot_jax.checks import check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import as_path, reading_errors
from llava_cot_jax.processing.control_tokens import CONTROL_TOKEN

STAGES = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
"""LLaVA-CoT's stages in their order. Each is enclosed in ``<NAME>`` and ``</NAME>``."""

FORMATS_FOLDER = Path(__file__).with_name("stage_formats")
"""Folder of the formats that have a name: one YAML file for each."""

QUESTION_PLACEHOLDER = "{question}"
"""Placeholder for the user's question in the prompt for the first stage."""


@dataclass(frozen=True)
class StageMarks:
    """Texts by which a stage is asked for, opened and closed.

    Attributes:
        name: Name of the stage.
        opening: Text that is written before the stage. White space at its ends is written, but not looked for. The
            first stage of a turn may go without.
        closing: Text that is written after the stage. Without one, a stage ends before the opening of any later stage,
            and the last stage of a turn ends with the turn.
        ask: What the user says for the stage: of the first stage with ``{question}`` for the question, which alone is
            the default. Any other stage that has one is answered in a turn of its own.
    """

    name: str
    opening: str | None = None
    closing: str | None = None
    ask: str | None = None

    @property
    def mark(self) -> str:
        """The opening as it is looked for; empty where there is none."""
        return (self.opening or "").strip()


@dataclass(frozen=True)
class StageFormat:
    """Format of a staged answer.

    Attributes:
        name: Name of the format, for traces and messages.
        stages: Stages in their order.
        conclusion: Name of the stage that is shown as the answer; empty for the last one.

    Raises:
        UserError: There are no stages, one of them cannot be told from another, or a text of one is empty or has a
            special token.
    """

    name: str
    stages: tuple[StageMarks, ...]
    conclusion: str = ""

    def __post_init__(self) -> None:
        check_text("the name of a stage format", self.name)
        try:
            self._check_texts()
            self._check_marks()
        except UserError as fault:
            raise UserError(f"stage format {self.name}: {fault}") from None
        if not self.conclusion:
            object.__setattr__(self, "conclusion", self.names[-1])

    @classmethod
    def tagged(cls, names: Sequence[str], name: str = "tags") -> Self:
        """Return the format in which each stage is enclosed in ``<NAME>`` and ``</NAME>``."""
        return cls(name, tuple(StageMarks(stage, f"<{stage}>", f"</{stage}>") for stage in names))

    @classmethod
    def load(cls, name_or_path: str | PathLike[str]) -> Self:
        """Return a format of the package by its name, such as ``"mulberry"``, or read one from a YAML file.

        A file is named with its ending or its folder, as in ``./mulberry``.

        Raises:
            UserError: There is no such format or file, or its content is no format.
        """
        known = sorted(path.stem for path in FORMATS_FOLDER.glob("*.yaml"))
        if name_or_path in known:
            path = FORMATS_FOLDER / f"{name_or_path}.yaml"
        elif isinstance(name_or_path, str) and name_or_path.isidentifier():
            raise UserError(f"there is no stage format {name_or_path}: give {', '.join(known)}, or a YAML file")
        else:
            path = as_path(name_or_path)
        import yaml  # it is not needed for the default

        with reading_errors(path):
            content = path.read_bytes()
        try:
            return cls._from_dict(path.stem, yaml.safe_load(content.decode()))
        except (yaml.YAMLError, UnicodeDecodeError) as fault:
            raise UserError(f"{path} is not YAML: {' '.join(str(fault).split())}") from None
        except UserError as fault:
            raise UserError(f"{path}: {fault}") from None

    @classmethod
    def _from_dict(cls, name: str, content: Any) -> Self:
        given = _keys("a stage format", content, {"stages", "conclusion"})
        stages, conclusion = given.get("stages"), given.get("conclusion", "")
        if not isinstance(stages, list) or not isinstance(conclusion, str):
            raise UserError("stages must be a list of stages, and conclusion the name of one")
        keys = {field.name for field in fields(StageMarks)}
        marks = [_keys("a stage", stage, keys) for stage in stages]
        if any("name" not in stage for stage in marks):
            raise UserError("a stage has no name")
        return cls(name, tuple(StageMarks(**stage) for stage in marks), conclusion)

    def __getitem__(self, name: str) -> StageMarks:
        """Return the stage of a name."""
        return self.stages[self.names.index(name)]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stages in their order."""
        return tuple(stage.name for stage in self.stages)

    @property
    def has_turns(self) -> bool:
        """Whether a stage after the first is asked for in a turn of its own."""
        return any(stage.ask is not None for stage in self.stages[1:])

    @property
    def around_question(self) -> tuple[str, str]:
        """Texts that the user says before and after a question to ask for the first stage."""
        before, _, after = (self.stages[0].ask or QUESTION_PLACEHOLDER).partition(QUESTION_PLACEHOLDER)
        return before, after

    def ends_turn(self, index: int) -> bool:
        """Whether a stage is the last one of a turn."""
        return index + 1 == len(self.stages) or self.stages[index + 1].ask is not None

    def later_marks(self, index: int) -> tuple[str, ...]:
        """Return the openings, as they are looked for, of the stages that come after a stage in its turn."""
        marks: list[str] = []
        for stage in self.stages[index + 1 :]:
            if stage.ask is not None:
                break
            marks.append(stage.mark)
        return tuple(marks)

    def _check_texts(self) -> None:
        if not isinstance(self.stages, tuple) or not all(isinstance(stage, StageMarks) for stage in self.stages):
            raise UserError(f"stages is {shown(self.stages)}; it must be a tuple of StageMarks")
        for stage in self.stages:
            check_text("the name of a stage", stage.name)
            for field in ("opening", "closing", "ask"):
                if (text := getattr(stage, field)) is not None:
                    check_text(f"{field} of {stage.name}", text)
                    if not text.strip():
                        raise UserError(f"{field} of {stage.name} is empty: leave it out where there is none")
                    if token := CONTROL_TOKEN.search(text):
                        raise UserError(
                            f"{field} of {stage.name} has the special token {token[0]}, which no answer shows: give a "
                            "text, or leave it out where the stage ends with its turn"
                        )
        names = self.names
        if not names or not all(map(str.strip, names)) or len(set(names)) < len(names):
            raise UserError(f"stages must have different names, at least one; got {names}")
        if self.conclusion and self.conclusion not in names:
            raise UserError(f"conclusion is {self.conclusion!r}, but the stages are {', '.join(names)}")

    def _check_marks(self) -> None:
        first, *others = self.stages
        if first.ask is not None and first.ask.count(QUESTION_PLACEHOLDER) != 1:
            raise UserError(f"ask of {first.name} must have {QUESTION_PLACEHOLDER} once")
        for stage in others:
            if stage.ask is None and stage.opening is None:
                raise UserError(f"{stage.name} has no opening, and no turn of its own (ask): it could not be found")
            if QUESTION_PLACEHOLDER in (stage.ask or ""):
                raise UserError(
                    f"ask of {stage.name} has {QUESTION_PLACEHOLDER}, which only the first stage is asked with"
                )
        for one, other in combinations([stage for stage in self.stages if stage.mark], 2):
            if one.mark in other.mark or other.mark in one.mark:
                raise UserError(
                    f"the openings of {one.name} and {other.name} cannot be told apart: {one.mark!r} and {other.mark!r}"
                )
        for closed, opened in permutations([stage for stage in self.stages if stage.closing or stage.mark], 2):
            closing, mark = (closed.closing or "").strip(), opened.mark
            if closing and mark and (closing in mark or mark in closing):
                raise UserError(
                    f"the closing of {closed.name} and the opening of {opened.name} cannot be told apart: leave out "
                    "the closing, and the stage ends before the next opening"
                )


def _keys(what: str, content: Any, known: set[str]) -> Mapping[str, Any]:
    """Return a mapping that has known keys alone."""
    if not isinstance(content, Mapping):
        raise UserError(f"{what} is {shown(content)}; it must be a mapping with the keys {', '.join(sorted(known))}")
    if unknown := sorted(map(str, set(content) - known)):
        raise UserError(f"{what} has the key {unknown[0]}; the keys are {', '.join(sorted(known))}")
    return content


LLAVA_COT = StageFormat.tagged(STAGES, "llava_cot")
"""The format of LLaVA-CoT, which is the default everywhere."""
