"""Ends of sentences, against texts that were divided by hand, whatever the tokens that spell them."""

import numpy as np
import pytest

from llava_cot_jax.data.shapes.tokenizer import shapes_config, shapes_tokenizer
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.sentences import sentence_automaton
from llava_cot_jax.inference.stop_strings import compile_stop_table, vocabulary_bytes
from llava_cot_jax.processing.processor import Processor
from tests.inference.test_stop_strings import random_split

END = "</CONCLUSION>"

# Each | is where a sentence is known to have ended: after the white space that tells, or at once after a wide mark.
ENGLISH = r"""
Two cats sit on a wall. |The left one is black.
Is it red? |Yes! |It is.
The mass is 3.5 kg. |So it sinks.
Use a tool, e.g. a lever, i.e. a rod. |Then push.
Dr. Smith met Mr. Jones vs. the board. |They left.
The answer is A. because the angle is right.
A. Cat B. Dog C. Bird
The U.S. map shows p. 4 and pp. 5 of it. |Look.
He said "stop." |Then he left.
He said (twice!) |that it works.
Prices: $3.99, 10% off. |Buy now!
Wait... |what?
Really?! |No.
Steps:\n1. Add the two.\n|2. Divide by three.\n|Done
First line\nsecond line\n\n|third line
**Bold end.** |Next.
See fig. 3 and eq. 4 for more. |Done.
It costs approx. 5 euros. |Cheap.
Version 2.0.1 works. |Version 3. |works too.
\n\n  Leading space. |And on
No end here
x = 2. |y = 3. |Thus x + y = 5.
<SUMMARY> I will count.</SUMMARY>\n\n|<CAPTION> A cat. |</CAPTION>
Is "A." the option? |Yes.
The train left at 5 p.m. and came at 6.
J. R. Smith wrote it. |It sold.
"""
GERMAN = r"""
Das ist z.B. ein Haus. |Es ist rot.
Das ist z. B. ein Haus, d.h. kein Zelt. |Gut.
Siehe Nr. 5 bzw. Nr. 6. |Danach weiter.
Um ca. 3,5 m höher. |Stimmt das? |Ja!
Prof. Müller kam ggf. später. |Schade.
Er rief: «Halt!» |Dann lief er.
Die Größe ist groß. |Übung macht den Meister.
"""
SPANISH_AND_FRENCH = r"""
¿Qué es esto? |¡Un gato! |Sí.
La Sra. López llegó. |El Sr. Ruiz no.
La Dra. Gil mide 1,70 m. |Es alta.
C'est un chat. |Il dort ! |Non ?
Voir p. 3, cf. la figure. |C'est clair.
M. Dupont est là. |Il rit.
Il a dit : «Oui.» |Puis il partit.
Été comme hiver. |À bientôt.
"""
CHINESE = r"""
图中有两只猫。|左边的是黑色。|
是红色吗？|是的！|它是。|
质量是3.5千克。|所以沉。|
答案是A。|因为角是直角。|
他说：“停。|”然后走了。|
第一行\n第二行\n\n|第三行
Both 猫 and dog. |好。|
\u3000\u3000图。|完
"""
CASES = [line for text in (ENGLISH, GERMAN, SPANISH_AND_FRENCH, CHINESE) for line in text.strip("\n").split("\n")]


def text_of(case: str) -> str:
    return case.replace("\\n", "\n").replace("\\u3000", "\u3000")


def ends_of(text: bytes, automaton: np.ndarray, unfinished: int) -> list[int]:
    """The number of bytes after which each sentence is known to have ended."""
    found, state = [], 0
    for place, byte in enumerate(text, 1):
        state = int(automaton[state, byte])
        if state >= unfinished:
            found.append(place)
            state -= unfinished
    return found


def test_the_table_is_large_enough() -> None:
    assert sum(case.count("|") for case in CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_sentences_end_where_a_reader_ends_them(case: str) -> None:
    automaton, accepting = sentence_automaton(END.encode())
    pieces = text_of(case).split("|")
    expected = np.cumsum([len(piece.encode()) for piece in pieces[:-1]]).tolist()
    assert ends_of("".join(pieces).encode(), automaton, len(automaton) - accepting) == expected


def test_the_end_of_the_answer_counts_wherever_it_begins() -> None:
    """Also in the token that ends the sentence before it."""
    automaton, accepting = sentence_automaton(END.encode())
    unfinished, last = len(automaton) - accepting, len(automaton) - 1
    state = 0
    for byte in b"It is red. </CONC":
        state = int(automaton[state, byte])
    assert unfinished < state < last
    state -= unfinished
    for byte in b"LUSION>":
        state = int(automaton[state, byte])
    assert state == last
    assert (automaton[last] == last).all()


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["llama3", "embedded"])
def test_whatever_the_tokens(vocabulary: str, request: pytest.FixtureRequest) -> None:
    """A table of tokens finds the end in the token that has its byte, and goes on in the state of that token's end."""
    embedded = Processor(shapes_config(), shapes_tokenizer())
    processor = request.getfixturevalue("published") if vocabulary == "llama3" else embedded
    entries = vocabulary_bytes(processor.tokenizer, processor.config.text.vocab_size, processor.control_tokens)
    by_bytes = {entry: i for i, entry in enumerate(entries) if entry}
    automaton, accepting = sentence_automaton(END.encode())
    (table,), unfinished = compile_stop_table([(automaton, accepting)], entries)
    rng = np.random.default_rng(0)
    for case in CASES:
        text = text_of(case).replace("|", "")
        if vocabulary == "embedded" and not text.isascii():
            continue
        ends = ends_of(text.encode(), automaton, unfinished)
        for _ in range(5):
            state, place, found = 0, 0, []
            for token in random_split(text.encode(), by_bytes, rng):
                state, before, place = int(table[state, token]), place, place + len(entries[token])
                if state >= unfinished:
                    state -= unfinished
                    found.append((before, place))
            crossed = {next(i for i, (a, b) in enumerate(found) if a < end <= b) for end in ends}
            assert len(found) == len(crossed)


def test_there_must_be_an_end_of_the_answer() -> None:
    with pytest.raises(UserError, match="must not be empty"):
        sentence_automaton(b"")
