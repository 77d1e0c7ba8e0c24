"""Tests that rows are found in JSON Lines, in arrays, and over several lines, by brute force where that is possible."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_cot_jax.data.raw.json_rows import split_rows
from llava_cot_jax.errors import UserError

WORDS = st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.integers() | WORDS,
    lambda more: st.lists(more, max_size=3) | st.dictionaries(WORDS, more, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.fixed_dictionaries({"id": VALUES, 'a "key" {': VALUES, "\\": VALUES}), min_size=2, max_size=5)

Writer = Callable[[list[dict]], str]

WRITERS: list[Writer] = [
    json.dumps,
    lambda rows: json.dumps(rows, indent=2),
    lambda rows: json.dumps(rows, ensure_ascii=False).replace("\n", "\r\n") + "\r\n",
    lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + ",\n]\n",
    lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    lambda rows: "\r\n".join(json.dumps(row) for row in rows),
    lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    lambda rows: ",\n".join(json.dumps(row, indent="\t") for row in rows) + "\n",
]


def texts(content: str | bytes) -> list[bytes]:
    content = content.encode() if isinstance(content, str) else content
    return [content[begin:end] for begin, end in split_rows(content, Path("rows.json"))]


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(rows=ROWS, write=st.sampled_from(WRITERS), bom=st.sampled_from(["", "\ufeff"]))
def test_every_row_and_nothing_else(rows: list[dict], write: Writer, bom: str) -> None:
    found = texts((bom + write(rows)).encode(errors="surrogatepass"))
    assert [json.loads(text) for text in found if text.strip(b" \r\n,")] == rows


def test_a_fault_leaves_the_other_rows() -> None:
    lines = [b'{"id": 1, "cut": "', b'{"id": 2}', b"[1, 2]", b'{"id": 3}}', b"", b'{"id": 4}']
    assert texts(b"\n".join(lines)) == [line + b"\n" for line in lines[:-1]] + lines[-1:]
    assert texts(b"[1, 2]\n[3]\n") == [b"[1, 2]\n", b"[3]\n"]
    assert texts(b'[{"id": 1}, nonsense, {"id": 2, "cut') == [b'{"id": 1}', b" nonsense", b' {"id": 2, "cut']
    assert texts(b'{\n"id": 1}\nnonsense\n{"id": 2}') == [b'{\n"id": 1}', b"nonsense\n", b'{"id": 2}']


@pytest.mark.parametrize(
    "row", [{"messages": [{}]}, {"id": 1, "turns": [{}]}, {"image": "a", "b": {}, "c": {}}, {}, {"a": [1]}, {"a": {}}]
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_single_row(row: dict, indent: int | None) -> None:
    text = json.dumps(row, indent=indent).encode()
    assert texts(text) == [text]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"info": {}, "data": [{"id": 1}]},
            r"with a list under 'data': write .*json\.load\(open\('rows\.json'\)\)\['data'\]",
        ),
        ({"features": [{"a": 1}], "rows": [{"id": 1}, {"id": 2}]}, r"with a list under .*\)\)\['rows'\]"),
        ({"a]b": [{}], "c": [{}]}, r"with a list under 'a\]b' and under 'c'"),
        ({"1": {"image": "a"}, "2": {"image": "b"}}, r"with 2 others in it: .*list\(json\.load.*\.values\(\)\)"),
    ],
)
def test_rows_inside_an_object(content: dict, message: str, indent: int | None) -> None:
    with pytest.raises(UserError, match=f"^annotations rows.json is one JSON object {message}"):
        texts(json.dumps(content, indent=indent))
