"""Division of a file of annotations into rows: JSON Lines, a JSON array, or JSON objects over several lines each."""

import json
import re
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

from llava_cot_jax.data.raw.row_parts import IMAGE_KEYS, TURN_KEYS
from llava_cot_jax.errors import UserError

Span = tuple[int, int]
"""Offsets in bytes of the beginning and the end of something in a file."""

BOM = b"\xef\xbb\xbf"

ROW_KEYS = {"id", *IMAGE_KEYS, *TURN_KEYS}

_TOKEN = re.compile(rb'"[^"\\\n]*(?:\\.[^"\\\n]*)*"|[\[\]{},]', re.DOTALL)
"""Pattern of a string, which may have any of the other characters in it, and of the marks of JSON's structure."""

_VISIBLE = re.compile(rb"\S")

_ENTRY = re.compile(rb'\s*("[^"\\\n]*(?:\\.[^"\\\n]*)*")\s*:\s*(\[\s*\{|\{)?', re.DOTALL)
"""Pattern of a key and the beginning of its value, if that is an object or a list of objects."""


def split_rows(content: mmap, path: Path) -> Iterator[Span]:
    """Return the span of each row, or of each line; a line may be blank.

    Args:
        content: Content of the file.
        path: Path of the file, for errors.

    Raises:
        UserError: The file is one JSON object that has the rows in it.
    """
    start = len(BOM) if content[: len(BOM)] == BOM else 0
    first = _next_visible(content, start)
    opening = content[first : first + 1]
    if opening not in (b"[", b"{"):
        return _lines(content, start)
    elements, end = _elements(content, first)
    alone = end is None or _next_visible(content, end) == len(content)
    if opening == b"[" and alone:  # perhaps cut short
        return (span for span in elements if _next_visible(content, span[0]) < span[1])
    if opening == b"{" and end:
        if alone:
            _check_is_row(content, elements, path)
        line = content[first : _line_end(content, first)]
        if b"\n" in content[first:end] and not _is_json(line) and _is_json(content[first:end]):
            return _values(content, first)
    return _lines(content, start)


def _lines(content: mmap, begin: int) -> Iterator[Span]:
    while begin < len(content):
        end = _line_end(content, begin)
        yield begin, end
        begin = end


def _values(content: mmap, begin: int) -> Iterator[Span]:
    """Return the spans of JSON objects that follow each other. What is none is a span up to the end of its line."""
    while (begin := _next_visible(content, begin)) < len(content):
        end = _elements(content, begin)[1] if content[begin : begin + 1] in (b"{", b"[") else None
        yield begin, end or _line_end(content, begin)
        begin = end or _line_end(content, begin)


def _elements(content: mmap, opening: int) -> tuple[list[Span], int | None]:
    """Return the spans of the elements of the array or object that begins at ``opening``, and its end.

    The end is None if the file ends before.
    """
    spans: list[Span] = []
    begin, depth = opening + 1, 0
    for token in _TOKEN.finditer(content, opening):
        match token[0]:
            case b"{" | b"[":
                depth += 1
            case b"}" | b"]":
                depth -= 1
                if not depth:
                    return [*spans, (begin, token.start())], token.end()
            case b"," if depth == 1:
                spans.append((begin, token.start()))
                begin = token.end()
    return [*spans, (begin, len(content))], None


def _check_is_row(content: mmap, elements: list[Span], path: Path) -> None:
    """Check that the only object of a file is a row, and does not have the rows in it.

    Raises:
        UserError: It has.
    """
    entries = [(entry, end - begin) for begin, end in elements if (entry := _ENTRY.match(content, begin, end))]
    keys = {_text(entry[1]): (entry[2] or b"")[:1] for entry, _ in entries}
    sizes = {_text(entry[1]): size for entry, size in entries}
    if keys.keys() & ROW_KEYS:
        return
    convert = "python -c \"import json; json.dump({}, open('train.json', 'w'))\"".format
    if lists := [key for key, value in keys.items() if value == b"["]:
        longest = max(lists, key=lambda key: sizes[key])
        chosen = convert(f"json.load(open('{path}'))['{longest}']")
        raise UserError(
            f"annotations {path} is one JSON object with a list under {' and under '.join(map(repr, lists))}: write "
            f"the list of the rows alone, as by `{chosen}`"
        )
    if len(keys) > 1 and set(keys.values()) == {b"{"}:
        chosen = convert(f"list(json.load(open('{path}')).values())")
        raise UserError(
            f"annotations {path} is one JSON object with {len(keys)} others in it: write them as a list, by `{chosen}`"
        )


def _text(string: bytes) -> str:
    """Return the text of a JSON string, or what stands in the file if it is damaged."""
    try:
        return str(json.loads(string))
    except ValueError:
        return string.decode(errors="replace")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _line_end(content: mmap, begin: int) -> int:
    """Return the offset after the end of the line in which ``begin`` lies."""
    return content.find(b"\n", begin) + 1 or len(content)


def _next_visible(content: mmap, begin: int) -> int:
    """Return the offset of the first byte from ``begin`` that is no space, or the end of the file."""
    found = _VISIBLE.search(content, begin)
    return found.start() if found else len(content)
