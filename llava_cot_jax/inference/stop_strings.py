"""Search for stop strings in sampled tokens, on the device, wherever the tokens' boundaries are.

A tag may begin and end inside tokens: in Llama 3's vocabulary ``</SUMMARY>`` usually ends in a token that holds ">" and
the blank line after it. So strings are matched on bytes. An automaton over bytes (Aho and Corasick, 1975) is run once
through every entry of the vocabulary from each of its states. After that a token costs one look-up in a stop table
[state, vocabulary entry].
"""

from collections.abc import Collection, Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from llava_cot_jax.errors import UserError

Automaton = np.ndarray
"""State after a byte, int32 [states, 256]. State 0 is the start, and the accepting states come last."""

TAILS = 3
"""Number of ways in which text may go on after a closed tag: no line break, one, a blank line."""


def byte_values() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's ``bytes_to_unicode``)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def vocabulary_bytes(tokenizer: PreTrainedTokenizerFast, size: int, control: Collection[str]) -> list[bytes]:
    """Return the bytes that each of ``size`` vocabulary entries adds to a text that ``Processor.decode`` returns.

    An added token adds its own text, special or not. Entries without a token add nothing.

    Args:
        tokenizer: Tokenizer of the vocabulary.
        size: Number of its entries.
        control: Added tokens that add nothing: ``Processor.control_tokens``.

    Raises:
        UserError: The tokenizer's vocabulary is not byte-level.
    """
    values, added = byte_values(), tokenizer.get_added_vocab()
    entries = [b""] * size
    for token, index in tokenizer.get_vocab().items():
        if index >= size:
            continue
        if token in added:
            entries[index] = b"" if token in control else token.encode()
        elif all(character in values for character in token):
            entries[index] = bytes(values[character] for character in token)
        else:
            raise UserError(f"the tokenizer is not byte-level: entry {index} is {token!r}; tags cannot be found in it")
    return entries


def string_automaton(strings: Sequence[bytes]) -> Automaton:
    """Return an automaton that finds the first of ``strings`` to be complete.

    It stays in accepting state i for ``strings[i]``. Where two are complete at once, the longer one counts.

    Raises:
        UserError: A string is empty, or there is none.
    """
    if not strings or not all(strings):
        raise UserError("a string to look for must not be empty")
    nodes = sorted({string[:end] for string in strings for end in range(len(string) + 1)}, key=lambda n: (len(n), n))
    ends = {string: i for i, string in reversed(list(enumerate(strings)))}

    def found(text: bytes) -> int | None:
        """Return the index of the longest string that ``text`` ends with."""
        return next((ends[text[start:]] for start in range(len(text)) if text[start:] in ends), None)

    inner = [node for node in nodes if found(node) is None]
    index = {node: i for i, node in enumerate(inner)}
    table = np.zeros((len(inner) + len(strings), 256), np.int32)
    for node, i in index.items():
        for byte in range(256):
            text = node + bytes([byte])
            if (string := found(text)) is not None:
                table[i, byte] = len(inner) + string
            else:
                table[i, byte] = next(index[text[start:]] for start in range(len(text) + 1) if text[start:] in index)
    for i in range(len(strings)):
        table[len(inner) + i] = len(inner) + i
    return table


def tag_automaton(tag: bytes) -> Automaton:
    """Return an automaton for a closing tag.

    In state i it has seen i bytes of the tag. The last three states accept: in the first no line break has followed
    the tag, in the second one, in the third a blank line or more.
    """
    table = string_automaton([tag])
    accept = len(table) - 1
    tails = np.full((TAILS, 256), accept, np.int32)
    for i in range(TAILS):
        tails[i, ord("\n")] = accept + min(i + 1, TAILS - 1)
    return np.concatenate([table[:accept], tails])


def heading_automaton(headings: Sequence[bytes]) -> Automaton:
    """Return an automaton for the headings that may follow a text.

    It counts line breaks, up to a blank line: in the first ``TAILS`` states, those at the end of a text that no heading
    begins at the end of; in the last ``TAILS``, which accept, those before the heading that is complete.

    Raises:
        UserError: A heading is empty, or there is none.
    """
    strings = string_automaton(headings)
    nodes = len(strings) - len(headings)
    depth = _depths(strings, nodes)
    table = np.zeros(((nodes + 1) * TAILS, 256), np.int32)
    for node in range(nodes):
        for byte in range(256):
            following = min(int(strings[node, byte]), nodes)
            for breaks in range(TAILS):
                if following == nodes or depth[following] == depth[node] + 1:
                    after = breaks  # the heading goes on, or is complete
                elif following:
                    after = 0  # another begins within it
                else:
                    after = min((0 if node else breaks) + 1, TAILS - 1) if byte == ord("\n") else 0
                table[node * TAILS + breaks, byte] = following * TAILS + after
    table[nodes * TAILS :] = np.arange(nodes * TAILS, (nodes + 1) * TAILS)[:, None]
    return table


def _depths(automaton: Automaton, nodes: int) -> list[int]:
    """Return the number of bytes that each of the first ``nodes`` states of a ``string_automaton`` has seen."""
    depths, frontier = [0] * nodes, {0}
    seen = set(frontier)
    for depth in range(1, nodes):
        frontier = {int(node) for node in automaton[sorted(frontier)].reshape(-1) if node < nodes} - seen
        seen |= frontier
        for node in frontier:
            depths[node] = depth
    return depths


def endless_automaton() -> Automaton:
    """Return an automaton that finds nothing, for a text that only an end-of-sequence token ends."""
    table = np.zeros((1 + TAILS, 256), np.int32)
    table[1:] = np.arange(1, 1 + TAILS)[:, None]
    return table


def case_insensitive(automaton: Automaton) -> Automaton:
    """Return an automaton for strings in lower case that finds them in upper case too."""
    table = automaton.copy()
    table[:, ord("A") : ord("Z") + 1] = table[:, ord("a") : ord("z") + 1]
    return table


def compile_stop_table(automata: Sequence[tuple[Automaton, int]], entries: Sequence[bytes]) -> tuple[np.ndarray, int]:
    """Return the stop tables of automata for a vocabulary.

    Args:
        automata: Automata, each with the number of its accepting states, which are its last.
        entries: Bytes of each entry of the vocabulary.

    Returns:
        State after an entry, uint8 [automata, states, entries], and the number of ``states``: in every table, state
        ``states + i`` is the automaton's i-th accepting state.

    Raises:
        UserError: There are more states than eight bits can count.
    """
    accept = max(len(table) - accepting for table, accepting in automata)
    if accept + max(accepting for _, accepting in automata) > 256:
        raise UserError("a tag or phrase to look for is too long")
    out = np.zeros((len(automata), accept, len(entries)), np.uint8)
    lengths = np.array([len(entry) for entry in entries])
    order = np.argsort(-lengths, kind="stable")
    longest = int(lengths.max(initial=0))
    matrix = np.zeros((len(entries), longest), np.uint8)
    for i, entry in enumerate(entries):
        matrix[i, : len(entry)] = np.frombuffer(entry, np.uint8)
    matrix = matrix[order]
    for a, (table, accepting) in enumerate(automata):
        unfinished = len(table) - accepting
        states = np.repeat(np.arange(unfinished)[:, None], len(entries), axis=1)
        for position in range(longest):
            reach = int((lengths > position).sum())  # the longer entries come first
            states[:, :reach] = table[states[:, :reach], matrix[:reach, position]]
        states = np.where(states >= unfinished, states - unfinished + accept, states)
        out[a, :unfinished, order] = states.T
    return out, accept
