"""Help texts and docstrings are plain sentences, and a public name means one thing in the whole package."""

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.parsers import STARTS, options_of, parser_of
from tests.processes import ROOT

PACKAGE = ROOT / "llava_cot_jax"

MODULES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

BAD_START = re.compile(r"(Of|Likewise|As|So|See|That|Those|From|In|To|By|With|For|At|On)\b", re.IGNORECASE)
"""Words with which no sentence begins that stands alone."""

CLASS_NAME = re.compile(r"[A-Z][a-z]+(?:[A-Z][a-z]+)+\b")
"""Name of a class where a word of the language belongs, such as a search for a class puts there."""

BAD_PHRASE = re.compile(
    r"\bsee there\b|\blikewise\b|\bso many\b|\bthe same of\b|\bwhat came of\b|\bof all that\b", re.IGNORECASE
)

SENTENCE_START = r"[A-Z`\"]"

ENTRY_START = rf"{SENTENCE_START}|(u?int|b?float)\d+\b|bool\b|\d|[a-z]+_\w"
"""Beginnings of an entry: that of a sentence, a dtype, a digit, or an identifier such as ``top_k``."""


def faults_of_sentence(text: str, least: int = 1, start: str = SENTENCE_START) -> Iterator[str]:
    """Yield what is wrong with a help text or with the entry of a section.

    Args:
        text: The sentences.
        least: Least number of words.
        start: Pattern of the beginnings that are allowed.
    """
    text = " ".join(text.split())
    if BAD_START.match(text):
        yield f"begins with {text.split()[0]!r}"
    elif not re.match(start, text):
        yield "does not begin with a capital letter"
    if phrase := BAD_PHRASE.search(text):
        yield f"says {phrase[0]!r}"
    if not text.endswith("."):
        yield "does not end with a period"
    if len(text.split()) < least:
        yield f"has fewer than {least} words"


def faults_of_docstring(docstring: str) -> Iterator[str]:
    """Yield what is wrong with a docstring, with the line of it."""
    first, *_ = docstring.partition("\n\n")
    if BAD_START.match(first) or first.startswith("What ") or CLASS_NAME.match(first):
        yield f"begins with {first.split()[0]!r}: {first.splitlines()[0]}"
    if phrase := BAD_PHRASE.search(docstring):
        yield f"says {phrase[0]!r}: {first.splitlines()[0]}"
    if not first.rstrip().endswith((".", "?", ":")):
        yield f"does not end with a period: {first.splitlines()[0]}"
    for name, text in entries(docstring):
        for fault in faults_of_sentence(text, start=ENTRY_START):
            yield f"entry {name} {fault}: {text}"


def entries(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each entry under ``Args:`` and ``Attributes:``."""
    for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE):
        for name, text in re.findall(r"^ {4}(\S[^:]*):(.*\n?(?: {5,}.*\n?)*)", section, re.MULTILINE):
            yield name, " ".join(text.split())


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Yield line, name and text of the docstrings of a module and of its public classes, functions and constants."""
    if text := ast.get_docstring(tree):
        yield 1, "module", text
    yield from _docstrings_in(tree.body, "")


def _docstrings_in(body: list[ast.stmt], within: str) -> Iterator[tuple[int, str, str]]:
    for node, following in itertools.zip_longest(body, body[1:]):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if text := ast.get_docstring(node):
                yield node.lineno, within + node.name, text
            if isinstance(node, ast.ClassDef):
                yield from _docstrings_in(node.body, f"{within}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(following, ast.Expr):
            names = defined_names(node)
            text = following.value.value if isinstance(following.value, ast.Constant) else None
            if isinstance(text, str) and names and not names[0].startswith("_"):
                yield node.lineno, within + names[0], text


def defined_names(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign(targets=targets):
            return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return []


@pytest.mark.parametrize("start", STARTS)
def test_help_texts_are_sentences(start):
    faults = []
    for option in options_of(parser_of(start)):
        if option.dest == "help":
            continue
        name = ", ".join(option.option_strings) or option.dest
        faults += [f"{start} {name} {fault}: {option.help}" for fault in faults_of_sentence(option.help or "", 3)]
    assert not faults, "\n".join(["", *faults])


@pytest.mark.parametrize("start", STARTS)
def test_titles_of_groups_are_plain(start):
    faults = []
    for group in parser_of(start)._action_groups:
        if group.title in ("options", "positional arguments") or not group._group_actions:
            continue
        title = group.title or ""
        bad = BAD_START.match(title) or BAD_PHRASE.search(title) or not re.match(r"[A-Z]", title)
        faults += [f"{start}: {title}"] if bad else []
    assert not faults, "\n".join(["", *faults])


def test_docstrings_are_sentences():
    faults = [
        f"{path}:{line} {name} {fault}"
        for path, tree in MODULES.items()
        for line, name, text in docstrings(tree)
        for fault in faults_of_docstring(text)
    ]
    assert not faults, "\n".join(["", *faults])


def test_a_public_name_is_defined_once():
    places = defaultdict(set)
    for path, tree in MODULES.items():
        for node in tree.body:
            for name in defined_names(node):
                if not name.startswith("_") and name != "main":
                    places[name].add(f"{path}:{node.lineno}")
    twice = [f"{name}: {', '.join(sorted(where))}" for name, where in sorted(places.items()) if len(where) > 1]
    assert not twice, "\n".join(["", *twice])


EXAMPLE = """Read a file.

Args:
    name: Name of the file,
        with its folder.
    *others: of other files.

Attributes:
    size: Its size
    mode: integer, the mode.
    count: int32, number of bytes.
    draws: top_k and top_p.
    flag: 0 or 1.

Raises:
    UserError: no such file
"""


def test_what_counts_as_a_fault():
    assert list(entries(EXAMPLE)) == [
        ("name", "Name of the file, with its folder."),
        ("*others", "of other files."),
        ("size", "Its size"),
        ("mode", "integer, the mode."),
        ("count", "int32, number of bytes."),
        ("draws", "top_k and top_p."),
        ("flag", "0 or 1."),
    ]
    assert list(faults_of_docstring(EXAMPLE)) == [
        "entry *others begins with 'of': of other files.",
        "entry size does not end with a period: Its size",
        "entry mode does not begin with a capital letter: integer, the mode.",
    ]
    assert list(faults_of_docstring("FileReader of a file.")) == ["begins with 'FileReader': FileReader of a file."]
    assert list(faults_of_docstring("Of a file: its name")) == [
        "begins with 'Of': Of a file: its name",
        "does not end with a period: Of a file: its name",
    ]
    assert list(faults_of_sentence("see there", 3)) == [
        "begins with 'see'",
        "says 'see there'",
        "does not end with a period",
        "has fewer than 3 words",
    ]
    assert list(faults_of_sentence("`--flag` turns it on.", 3)) == []
    assert list(faults_of_sentence("int32, number of bytes.", 3)) == ["does not begin with a capital letter"]
