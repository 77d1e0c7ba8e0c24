"""Files of questions and of their answers, for ``generate --questions``: JSON lines that a killed run goes on with."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llava_cot_jax.checks import check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json, write_json, write_lines
from llava_cot_jax.line_file import LineFile
from llava_cot_jax.paths import as_path, is_remote, reading_errors, writing_errors

KEYS = ("id", "question", "image", "images", "seed")
"""Keys that a row of a file of questions may have."""

_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class QuestionRow:
    """Row of a file of questions.

    Attributes:
        id: Text or whole number that tells it from all others.
        question: Text of the question.
        seed: Seed of its draws; None takes the command's.
        images: Images as the row names them.
        sources: The images: a list of paths, of which those in the row are relative to the file's folder, of ``data:``
            URLs, and of the bytes of files; or another sequence of bytes, which are read when they are needed.
    """

    id: str | int
    question: str
    seed: int | None = None
    images: list[str] = field(default_factory=list)
    sources: Sequence[str | bytes] = field(default_factory=list)


def read_question_rows(path: Path) -> list[QuestionRow]:
    """Read a file of questions: JSON lines with the keys of ``KEYS``, of which ``id`` and ``question`` are needed.

    Raises:
        UserError: The file cannot be read, a line is no such row, or two rows have the same id.
    """
    with reading_errors(path):
        lines = json_lines(path, path.read_bytes())
    return unique_rows(path, ((place, question_row(row, place, path.parent)) for place, row in lines))


def json_lines(path: Path, content: bytes | Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the object of each line of a JSONL file that is not blank, after the words that say where it is.

    Args:
        path: Path of the file, for messages.
        content: What it has, or its lines.

    Raises:
        UserError: A line is no JSON object.
    """
    for number, line in enumerate(content.split(b"\n") if isinstance(content, bytes) else content, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise UserError(f"{place} is not JSON: {fault}") from None
        if not isinstance(row, dict):
            raise UserError(f"{place} is no JSON object, but {shown(row)}")
        yield place, row


def unique_rows(path: Path, rows: Iterable[tuple[str, QuestionRow]]) -> list[QuestionRow]:
    """Return rows of a file, each of which comes after the words that say where it is.

    Raises:
        UserError: There are none, or two have the same id.
    """
    known: dict[str | int, QuestionRow] = {}
    for place, row in rows:
        if row.id in known:
            raise UserError(
                f"{place} has the id {shown(row.id)} of an earlier line: give each question an id of its own"
            )
        known[row.id] = row
    if not known:
        raise UserError(f"{path} has no questions: give one JSON object with id and question on each line")
    return list(known.values())


def question_row(row: Mapping[str, Any], place: str, folder: Path, more_keys: Sequence[str] = ()) -> QuestionRow:
    """Return the question of a row.

    Args:
        row: The row, with the keys of ``KEYS``.
        place: Words that say where it is, for messages.
        folder: Folder that the paths of its images are relative to.
        more_keys: Keys that it may have as well.

    Raises:
        UserError: It has another key, or a value is not of its kind.
    """
    from llava_cot_jax.processing.images import is_data_url

    keys = (*KEYS, *more_keys)
    if unknown := [key for key in row if key not in keys]:
        raise UserError(f"{place} has the key {shown(unknown[0])}; the keys of a question are {', '.join(keys)}")
    identifier, question, seed = row.get("id"), row.get("question"), row.get("seed")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise UserError(f"{place}: id is {shown(identifier)}; it must be a text or a whole number")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{place}: question is {shown(question)}; it must be a text")
    for name, text in (("id", str(identifier)), ("question", question)):
        check_text(f"{place}: {name}", text)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _LARGEST_SEED):
        raise UserError(f"{place}: seed is {shown(seed)}; it must be a whole number from 0 to {_LARGEST_SEED}")
    if "image" in row and "images" in row:
        raise UserError(f"{place} has both image and images: give one of them")
    images = [row["image"]] if row.get("image") is not None else row.get("images") or []
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise UserError(f"{place}: images is {shown(images)}; it must be a list of paths")
    sources: list[str | bytes] = [image if is_data_url(image) else _source(image, folder) for image in images]
    return QuestionRow(identifier, question, seed, images, sources)


def _source(image: str, folder: Path) -> str:
    """Return an image's path, relative to the folder of the file of questions, or its URL."""
    return image if "://" in image else str(folder / image)


def files_digest(sources: Sequence[str | bytes]) -> str | None:
    """Return a digest of the images that are files on a disk; None where there are none, or one cannot be read."""
    from llava_cot_jax.processing.images import is_data_url

    if not isinstance(sources, list):
        return None  # those of a data set are read when they are needed
    digest, count = hashlib.sha256(), 0
    try:
        for source in sources:
            if isinstance(source, str) and not is_data_url(source) and not is_remote(path := as_path(source)):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
                count += 1
    except (OSError, UserError):
        return None
    return digest.hexdigest()[:16] if count else None


@dataclass(frozen=True)
class AnsweredQuestion:
    """Question of a row with an answer.

    Attributes:
        question: Its text.
        images: Its images as its file names them.
        seed: Seed of its draws; None where the row does not say it.
        files_digest: Digest of the images that are files; None where the row does not say it.
    """

    question: str
    images: list[str]
    seed: int | None = None
    files_digest: str | None = None


class AnswerFile:
    """File that takes an answer after the other, each as a JSON line that stays whatever happens afterwards.

    A file that is there already is continued: a last line that was cut off is dropped, and the others are known. The
    settings stand in a file beside it. While it is open, no other process can open it so.

    Args:
        path: Path of the file, on a disk.
        settings: Settings that the answers depend on, by their names, as JSON has them.

    Attributes:
        known: Each question whose answer it has, by its id.

    Raises:
        UserError: The file cannot be written or is no such file, another process has it open, or it was begun with
            other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.known: dict[str | int, AnsweredQuestion] = {}
        self._path, self._settings_path = path, path.with_name(f"{path.name}.settings.json")
        self._file = LineFile(path)
        try:
            self._check_settings(dict(settings))
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Append an answer, which is on the disk when this returns.

        Raises:
            UserError: It cannot be written.
        """
        self._file.append([_line(row)])
        self._note(row)

    def unanswered(self, rows: Sequence[QuestionRow], seed: int = 0) -> list[int]:
        """Return the indices of the rows whose answers it does not have.

        Args:
            rows: The questions.
            seed: Seed of a row that has none of its own.

        Raises:
            UserError: It has the answer to another question of the same id, or by another seed, or about other files of
                the same names.
        """
        for row in rows:
            if (known := self.known.get(row.id)) and (fault := _difference(known, row, seed)):
                raise UserError(f"{self._path} has the answer {fault}: name another output")
        return [index for index, row in enumerate(rows) if row.id not in self.known]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the row of each answer, in the order of the file."""
        return (json.loads(line) for _, line in self._file.lines() if line.strip())

    def put_in_order(
        self, ids: Sequence[str | int], completed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    ) -> list[Mapping[str, Any]]:
        """Put the answers in the order of the questions with these ids, and those to others after them.

        The file is replaced by a new one at once, so that no answer is lost on the way.

        Args:
            ids: Ids of the questions.
            completed: Function that returns what is written of a row.

        Returns:
            The rows as they are written.

        Raises:
            UserError: It cannot be written.
        """
        places = {identifier: place for place, identifier in enumerate(ids)}
        stored = sorted(self.rows(), key=lambda row: places.get(row["id"], len(places)))
        rows = [completed(row) for row in stored]
        with writing_errors(self._path):
            before = (line for _, line in self._file.lines())
            if any(row != line for row, line in zip_longest(map(_line, rows), before)):
                write_lines(self._path, map(_line, rows))
        return rows

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _note(self, row: Mapping[str, Any]) -> None:
        asked = row["question"], list(row["images"]), row.get("seed"), row.get("files_digest")
        self.known[row["id"]] = AnsweredQuestion(*asked)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """Check that the file was begun with these settings, or write them down where it is empty."""
        if not self._file.size:
            with writing_errors(self._settings_path):
                write_json(self._settings_path, settings)
            return
        if not self._settings_path.exists():
            raise UserError(
                f"{self._path} exists, but {self._settings_path.name}, which says how it was begun, does not: name "
                "another output"
            )
        begun = read_json(self._settings_path)
        for name in [*settings, *begun]:
            if (before := begun.get(name)) != (now := settings.get(name)):
                raise UserError(
                    f"{self._path} was begun with {name} = {json.dumps(before)}, which is {json.dumps(now)} now: give "
                    "the same settings to go on, or name another output"
                )

    def _read(self) -> None:
        """Read what was answered, and cut off a last line that was not written whole."""
        for number, (_, line) in enumerate(self._file.lines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                is_second = row["id"] in self.known
                self._note(row)
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self._path}, line {number} is no answer of this command: name another output"
                ) from None
            if is_second:
                raise UserError(
                    f"{self._path}, line {number} has a second answer with the id {shown(row['id'])}: delete one"
                )


def _difference(known: AnsweredQuestion, row: QuestionRow, seed: int) -> str | None:
    """Return how a question differs from the one of its id that was answered; None where it does not."""
    named = f"the id {shown(row.id)}"
    if (known.question, known.images) != (row.question, row.images):
        return f"to another question with {named}"
    if known.seed not in (None, now := seed if row.seed is None else row.seed):
        return f"to {named} by the seed {known.seed}, which is {now} now"
    if known.files_digest and files_digest(row.sources) not in (None, known.files_digest):
        return f"to {named} about other pictures, which have changed under the same names"
    return None


def _line(row: Mapping[str, Any]) -> bytes:
    """Return the line of a row."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode(errors="replace") + b"\n"
