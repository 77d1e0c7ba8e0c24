"""Searches in the formats of other reasoners: against brute force, and against a reading of bytes."""

import jax
import numpy as np
import pytest

from llava_cot_jax.data.shapes.tokenizer import shapes_config, shapes_tokenizer
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import EndReason, Samples
from llava_cot_jax.inference.stop_strings import TAILS, vocabulary_bytes
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.scorers import Judge, LogProbability
from llava_cot_jax.search.stage_ends import end_stage
from llava_cot_jax.search.strategies import BestOfN, Greedy, MajorityVote, Sample, StageBeam
from llava_cot_jax.search.tables import build_stage_tables, token_ids, vocabulary_of
from llava_cot_jax.stage_format import LLAVA_COT, StageFormat, StageMarks
from tests.inference.test_stop_strings import decoded, random_split
from tests.search import brute_force
from tests.search.models import random_model, scene
from tests.search.test_search import check_against_brute_force
from tests.test_stage_format import FORMATS, THINK, changed
from tests.tiers import in_tiers

LETTERS = StageFormat(
    "letters",
    (
        StageMarks("PLAN", "P:\n"),
        StageMarks("LOOK", "e"),
        StageMarks("THINK", "o", "s"),
        StageMarks("SAY", "ar"),
        StageMarks("AGAIN", None, None, "Once more?"),
    ),
    "SAY",
)
"""Letters as marks, which a random model often writes, with stages of every kind."""

ALL = FORMATS | {"think": THINK, "letters": LETTERS}


@pytest.fixture(scope="module")
def ending():
    """A random model that often ends an answer: one token in sixty does."""
    return random_model(1, eos=tuple(range(0, 500, 60)))


@pytest.fixture(scope="module")
def embedded() -> Processor:
    return Processor(shapes_config(), shapes_tokenizer())


@pytest.fixture(params=["llama3", "embedded"])
def processor(request, published, embedded) -> Processor:
    return published if request.param == "llama3" else embedded


def beam(format: StageFormat, count: int = 3, **more) -> StageBeam:
    return StageBeam(count, Judge(), temperature=1.1, max_new_tokens=9, top_k=None, top_p=1.0, format=format, **more)


@pytest.mark.parametrize("name", in_tiers(ALL, suite=["letters"]))
def test_a_stage_beam_searches_as_brute_force_does(ending, prompts, monkeypatch, name):
    image, question = scene(3)
    answer = check_against_brute_force(monkeypatch, *ending, beam(ALL[name]), prompts, image, question, seed=5)
    check_answer(answer, ALL[name])
    if name == "letters":
        ends = {c.ended for stage in answer.trace.stages for c in stage.candidates}
        assert ends >= {"heading", "tag", "max_new_tokens"}


ONE_ANSWER = [*((Sample, name) for name in ALL), (Greedy, "llava_cot"), (Greedy, "llamav_o1")]


@pytest.mark.parametrize(
    "case", in_tiers(ONE_ANSWER, suite=[(Sample, "letters"), (Greedy, "llava_cot")]), ids=lambda case: case[1]
)
def test_one_answer_is_what_brute_force_writes(ending, prompts, monkeypatch, case):
    (strategy, name), (image, question) = case, scene(2)
    given = strategy(max_new_tokens=20, format=ALL[name])
    answer = check_against_brute_force(monkeypatch, *ending, given, prompts, image, question, seed=4)
    assert len(answer.trace.stages) == (len(ALL[name].stages) if ALL[name].has_turns else 1)
    if ALL[name].has_turns:
        check_answer(answer, ALL[name])


def check_answer(answer, format: StageFormat) -> None:
    """Check the stages, the conclusion and the text of an answer by its trace."""
    assert list(answer.stages) == list(format.names)
    assert answer.conclusion == answer.stages[format.conclusion]
    for stage, marks in zip(answer.trace.stages, format.stages, strict=True):
        won = stage.candidates[stage.winner]
        text = won.text + won.added
        assert answer.stages[marks.name] == (text.partition(marks.closing)[0] if marks.closing else text).strip()
        assert ((marks.opening or "") + won.text).strip() in answer.text
        natural = {"tag"} if marks.closing else {"heading", "turn"}
        assert (marks.name in answer.trace.forced_stages) == (won.ended not in natural)


FILLERS = [
    "",
    " ",
    "\n",
    "\n\n",
    "\n\n\n",
    "#",
    "##",
    "### ",
    "### Rat",
    "(Here",
    "</",
    "e",
    "a",
    " 3 < 4.",
    "猫",
    ".\n\n",
]


@pytest.mark.parametrize("name", in_tiers(["mulberry", "think", "letters", "llava_cot"], suite=["letters"]))
def test_what_is_kept_of_a_candidate_is_what_its_bytes_say(processor, name):
    """Texts in any tokens that spell them: what stands before a heading, and the line breaks at its end."""
    format = ALL[name]
    tables = build_stage_tables(processor, StageBeam(format=format).to_spec(), vocabulary_of(processor))
    entries = vocabulary_bytes(processor.tokenizer, processor.config.text.vocab_size, processor.control_tokens)
    by_bytes = {entry: i for i, entry in enumerate(entries) if entry}
    rng, seen = np.random.default_rng(0), set()
    stop_tables = np.asarray(tables.stop_tables)
    for number, stage in enumerate(format.stages):
        headings = [] if stage.closing else brute_force.next_headings(format, number)
        ends = [stage.closing.strip()] if stage.closing else headings
        marks = [s.opening.strip() for s in format.stages if s.opening]
        halves = [mark[: len(mark) // 2] for mark in marks]
        rows = []
        for _ in range(200):
            text = "".join(rng.choice([*FILLERS, *marks, *halves, *ends]) for _ in range(rng.integers(1, 6)))
            ids, state, reason = [], 0, EndReason.MAX_NEW_TOKENS if rng.integers(2) else EndReason.EOS
            for token in random_split(text.encode(), by_bytes, rng):
                ids.append(token)
                state = int(stop_tables[number, state, token])
                complete = any(end.encode() in b"".join(entries[i] for i in ids) for end in ends)
                assert (state >= tables.num_states) == complete
                if complete:
                    reason = EndReason.TAG
                    break
            rows.append((ids, state, reason))
        width = max(len(ids) for ids, *_ in rows)
        tokens = np.array([ids + [7] * (width - len(ids)) for ids, *_ in rows])
        lengths, states, reasons = (np.array(x) for x in zip(*((len(i), s, r) for i, s, r in rows), strict=True))
        samples = Samples(tokens, lengths, reasons, states, np.zeros(len(rows)))
        batch = jax.tree.map(lambda x: x[None], samples)
        kept, breaks = jax.device_get(end_stage(batch, tables, np.array([number], np.int32)))
        for (ids, _, reason), length, found in zip(rows, kept.lengths[0], breaks[0], strict=True):
            whole = b"".join(entries[i] for i in ids)
            want = len(ids)
            if headings and reason != EndReason.EOS:
                counts = range(len(ids), 0, -1)
                spelled = ((n, b"".join(entries[i] for i in ids[:n]).decode(errors="replace")) for n in counts)
                want = next((n for n, text in spelled if not brute_force.ends_in(text, headings)), 0)
            assert length == want, (whole, reason)
            text = b"".join(entries[i] for i in ids[:want])
            if headings:
                assert found == min(len(text) - len(text.rstrip(b"\n")), 2), (whole, reason)
            elif stage.closing and reason == EndReason.TAG:
                tail = text.partition(ends[0].encode())[2]
                assert found == min(len(tail) - len(tail.rstrip(b"\n")), 2)
            seen.add((bool(headings), EndReason(reason).name, want < len(ids)))
    if name != "llava_cot":
        assert {(True, "TAG", True), (True, "MAX_NEW_TOKENS", True), (True, "EOS", False)} <= seen


@pytest.mark.parametrize("name", ALL)
def test_openings_come_after_one_blank_line_or_in_a_turn_of_their_own(processor, name):
    format = ALL[name]
    tables = build_stage_tables(processor, StageBeam(format=format).to_spec(), vocabulary_of(processor))
    for number, stage in enumerate(format.stages):
        for tail in range(TAILS):
            ids = tables.openings[number, tail]
            if number and stage.ask:
                turn = brute_force.TURN.format(ask=stage.ask) + (stage.opening or "")
                assert ids.tokens[: ids.lengths].tolist() == token_ids(processor, turn)
            else:
                text = decoded(processor, ids)
                assert "\n" * tail + text == "\n" * (2 if stage.opening else tail) + (stage.opening or "")


def test_the_first_prompt_is_that_of_the_format(ending, prompts):
    _, processor = ending
    for name, format in ALL.items():
        inputs = RequestBuilder(processor, Greedy(5, format=format), prompts).build([None], ["Why?"]).inputs
        ids = inputs.model_inputs["input_ids"][0, : inputs.lengths[0]]
        assert "Why?".join(format.around_question) in processor.decode(ids), name
        asked = inputs.question[0]
        assert processor.decode(asked.tokens[: asked.lengths]) == "Why?"  # the judge is told the question alone


def test_each_field_of_a_format_changes_the_tables(embedded):
    def tables(format):
        return jax.tree.map(
            np.asarray, build_stage_tables(embedded, StageBeam(format=format).to_spec(), vocabulary_of(embedded))
        )

    def alike(one, other):
        return jax.tree.structure(one) == jax.tree.structure(other) and all(
            jax.tree.leaves(jax.tree.map(np.array_equal, one, other))
        )

    before = tables(LETTERS)
    assert alike(before, tables(StageFormat("other", LETTERS.stages, "PLAN")))
    for number, marks in enumerate(
        [{"opening": "Q:\n"}, {"opening": "u"}, {"closing": "t"}, {"ask": "Well?"}, {"ask": "And now?"}]
    ):
        assert not alike(before, tables(changed(LETTERS, number, **marks))), number
    assert not alike(before, tables(changed(LETTERS, 4, name="MORE")))  # the judge is told the name


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: StageBeam(format="mulberry"), "format is 'mulberry'; give a StageFormat, such as"),
        (lambda: Greedy(format=None), "format is None; give a StageFormat"),
        (lambda: StageBeam(format=FORMATS["mulberry"], stages=("A", "B")), "but the format mulberry has"),
        (lambda: StageBeam((1, 2, 3), format=FORMATS["mulberry"]), "3 values for 4 stages"),
        (lambda: MajorityVote(format=FORMATS["llamav_o1"]), "cannot be sampled whole: search with StageBeam"),
        (lambda: BestOfN(format=FORMATS["llamav_o1"]), "cannot be sampled whole"),
    ],
)
def test_a_format_that_a_strategy_cannot_take(make, said):
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.slow
def test_a_mark_that_is_too_long(embedded, prompts):
    with pytest.raises(UserError, match="too long"):
        RequestBuilder(embedded, StageBeam(format=changed(LLAVA_COT, 1, closing="x" * 300)), prompts)


@pytest.mark.slow
def test_the_vote_is_over_the_conclusions_of_the_format(ending, prompts):
    format = StageFormat("vote", (StageMarks("THINK"), StageMarks("ANSWER", "e")))
    strategy = MajorityVote(6, temperature=1.2, max_new_tokens=10, top_p=1.0, format=format)
    answer = Reasoner(*ending, strategy, prompts).answer(*scene(1), seed=3)
    (stage,) = answer.trace.stages
    bodies = [c.text.partition("e")[2].strip() if "e" in c.text else c.text.strip() for c in stage.candidates]
    assert answer.conclusion == bodies[stage.winner]
    assert len(set(bodies)) > 1 and any("e" in c.text for c in stage.candidates)


@pytest.mark.slow
def test_neighbours_change_nothing_in_a_format_with_headings(ending, prompts):
    strategy = StageBeam(3, LogProbability(), temperature=1.1, max_new_tokens=9, top_k=None, format=LETTERS)
    reasoner = Reasoner(*ending, strategy, prompts)
    images, questions = (list(x) for x in zip(*map(scene, range(3)), strict=True))
    together = reasoner.answer_batch(images, questions, seeds=[7, 8, 9])
    turned = reasoner.answer_batch(images[::-1], questions[::-1], seeds=[9, 8, 7])
    assert [a.text for a in together] == [a.text for a in turned[::-1]]
