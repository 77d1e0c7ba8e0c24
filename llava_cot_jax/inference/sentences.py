"""Ends of sentences in sampled tokens, on bytes: an automaton for ``stop_strings.compile_stop_table``.

A sentence ends

- after ``.``, ``!`` or ``?``, with the quotes and brackets that close after it, once white space follows;
- after a line break, once white space follows, which is a blank line or an indented one;
- with ``。``, ``！`` or ``？``, whatever follows.

A full stop does not end one after an abbreviation, after a single capital letter or one that a full stop precedes
("A.", "e.g.", "U.S."), or after a number that a line begins with ("2. Then ..."). A decimal has no white space after
its point. The white space that tells that a sentence is over may come in one token with the beginning of the next one.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from llava_cot_jax.inference.stop_strings import Automaton, string_automaton

ABBREVIATIONS = (
    *("approx", "cf", "Dr", "eq", "fig", "Jr", "Mr", "Mrs", "Ms", "Prof", "resp", "Sr", "St", "vs"),
    *("bzw", "ca", "ggf", "Nr", "z"),  # German; "z. B." is also written with a space
    *("env", "p", "pp"),  # French
    *("Dra", "Sra", "Ud"),  # Spanish
)
"""Abbreviations that end with a full stop, in upper or lower case, other than those of single letters."""

WHITE_SPACE, CLOSERS = b" \t\n\r", b"\"')]}*_"
END_BYTES = tuple(mark.encode() for mark in "。！？")
CLOSER_BYTES = tuple(mark.encode() for mark in "”’»")
WIDE_SPACE = "\u3000".encode()
_SEQUENCES = (*END_BYTES, *CLOSER_BYTES, WIDE_SPACE)

_OTHER_WORD, _CAPITAL, _NUMBER = b"*", b"^", b"#"
"""Words that begin no abbreviation, single capital letters that begin none, and numbers that a line begins with."""

_DOTTED, _DOTTED_LETTER = b".", b".a"
"""No word, right after a full stop; and a single letter there, as in "e.g."."""


class _State(NamedTuple):
    """What the end of a sentence depends on after some bytes of it.

    Attributes:
        fresh: Whether there was nothing but white space.
        pending: Mark that ends the sentence if white space follows: ``b"."``, ``b"\\n"``, or nothing.
        word: Beginning of an abbreviation, a single letter, one of the marks for other words, or nothing between words.
        partial: Bytes of a character that is not complete, of those that matter.
    """

    fresh: bool = True
    pending: bytes = b""
    word: bytes = b""
    partial: bytes = b""


_START = _State()
_BEGINNINGS = {word.lower().encode()[:end] for word in ABBREVIATIONS for end in range(1, len(word.encode()) + 1)}
_WHOLE = {word.lower().encode() for word in ABBREVIATIONS}


def sentence_automaton(end_of_answer: bytes | None) -> tuple[Automaton, int]:
    """Return an automaton that finds the end of a sentence, or of the whole answer.

    The first half of the states is unfinished. Accepting state i means that a sentence has ended, and that the bytes
    after it have led to unfinished state i, from which the next sentence goes on. In the last accepting state, the
    answer has ended.

    Args:
        end_of_answer: Bytes that end the answer, such as its last closing tag; None where the model's turn alone does.

    Returns:
        The automaton, and the number of its accepting states.

    Raises:
        UserError: ``end_of_answer`` is empty.
    """
    ending = np.zeros((1, 256), np.int32) if end_of_answer is None else string_automaton([end_of_answer])
    whole = None if end_of_answer is None else len(ending) - 1
    Pair = tuple[_State, int]
    index: dict[Pair, int] = {(_START, 0): 0}
    moves: list[list[tuple[Pair, bool]]] = []
    for state, seen in _growing(index):
        row: list[tuple[Pair, bool]] = []
        for byte in range(256):
            after, ended = _step(state, byte)
            pair = after, int(ending[seen, byte])
            if pair[1] != whole:
                index.setdefault(pair, len(index))
            row.append((pair, ended))
        moves.append(row)
    count = len(index)
    table = np.zeros((2 * count + 1, 256), np.int32)
    for i, row in enumerate(moves):
        for byte, (pair, ended) in enumerate(row):
            to = 2 * count if pair[1] == whole else index[pair]
            table[i, byte] = to if pair[1] == whole else to + count * ended
            table[count + i, byte] = to if pair[1] == whole else to + count
    table[2 * count] = 2 * count
    return table, count + 1


def _growing(index: dict[tuple[_State, int], int]) -> Iterable[tuple[_State, int]]:
    """Yield the keys of a dict that grows meanwhile, in the order in which they were added."""
    done = 0
    while done < len(index):
        yield list(index)[done]
        done += 1


def _step(state: _State, byte: int) -> tuple[_State, bool]:
    """Return the state after one more byte, and whether a sentence ended with it."""
    char = bytes([byte])
    sequence = state.partial + char
    if byte >= 0x80 or state.partial:
        if sequence in END_BYTES:
            return _START, True
        if sequence in CLOSER_BYTES:
            return _State(False, state.pending if state.pending == b"." else b""), False
        if sequence == WIDE_SPACE:
            return _space(state._replace(partial=b""), b" ")
        if byte >= 0x80 and any(known.startswith(sequence) for known in _SEQUENCES):
            return state._replace(word=b"", partial=sequence), False
        if byte >= 0x80:
            return _State(False, b"", _OTHER_WORD), False
        state = _State(False, b"", _OTHER_WORD)  # it was another character after all
    if char in WHITE_SPACE:
        return _space(state, char)
    if char in b".!?":
        may_end = char != b"." or not _is_shortened(state.word)
        return _State(False, b"." if may_end else b"", _DOTTED), False
    if char in CLOSERS:
        return _State(False, state.pending if state.pending == b"." else b""), False
    if char.isdigit():
        begins = not state.word and (state.fresh or state.pending == b"\n")
        return _State(False, b"", _NUMBER if begins or state.word == _NUMBER else _OTHER_WORD), False
    return _State(False, b"", _longer(state.word, char) if char.isalpha() else b""), False


def _space(state: _State, char: bytes) -> tuple[_State, bool]:
    """Return the state after white space, and whether a sentence ended with it."""
    if state.fresh:
        return _START, False
    if state.pending:
        return _START, True
    return _State(False, b"\n" if char == b"\n" else b""), False


def _longer(word: bytes, more: bytes) -> bytes:
    """Return a word with one more letter, as far as the word matters."""
    if word == _DOTTED:
        return _DOTTED_LETTER if more.isalpha() else _OTHER_WORD
    longer = (word + more).lower()
    if not word and more.isupper():
        return more if longer in _BEGINNINGS else _CAPITAL
    return longer if longer in _BEGINNINGS else _OTHER_WORD


def _is_shortened(word: bytes) -> bool:
    """Whether a full stop after a word belongs to the word, or to a number at the beginning of a line."""
    return word in (_NUMBER, _CAPITAL, _DOTTED_LETTER) or word.lower() in _WHOLE or (len(word) == 1 and word.isupper())
