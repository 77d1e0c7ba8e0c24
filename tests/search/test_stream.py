"""Streams of questions: the answers of each alone, in whatever company, with bounded memory and nothing compiled."""

import gc
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.sharding import make_mesh
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.search import slots as slot_pieces
from llava_cot_jax.search import stream as module
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.scorers import Judge, LogProbability, Verifier
from llava_cot_jax.search.slot_search import SlotSearch
from llava_cot_jax.search.strategies import BestOfN, Greedy, MajorityVote, Sample, StageBeam, WeightedVote
from llava_cot_jax.search.stream import WAITING_PER_SLOT, Question
from llava_cot_jax.search.tables import token_ids
from tests.search.models import random_model, scene
from tests.search.test_search import on
from tests.tiers import EXHAUSTIVE, in_tiers

RATIONALE = Judge("rationale", reason_tokens=7, check_tokens=5)
SLOTS = 3


@pytest.fixture(scope="module")
def ending():
    """A random model that often ends an answer: one token in sixty does, so that lengths are drawn unevenly."""
    return random_model(1, eos=tuple(range(0, 500, 60)))


@pytest.fixture(scope="module")
def sampler(ending):
    """A reasoner that compiles fast: one candidate, and no judge."""
    return Reasoner(*ending, Sample(1.0, max_new_tokens=40, top_k=None, top_p=1.0))


def questions(count: int) -> list[Question]:
    """Questions about pictures with seeds of their own; every fourth has none, every fifth has more words."""
    return [
        Question(f"{scene(i)[1]}{' red' * (i % 5)}", None if i % 4 == 3 else scene(i)[0], seed=i) for i in range(count)
    ]


def plain(answer) -> dict:
    """Return all of an answer but the times."""
    stages = [replace(stage, scorer_seconds=0.0) for stage in answer.trace.stages]
    return vars(answer) | {"trace": vars(answer.trace) | {"seconds": None, "stages": stages}}


STRATEGIES = {
    "sample": Sample(1.0, max_new_tokens=40, top_k=None, top_p=1.0),
    "vote": MajorityVote(3, temperature=1.2, max_new_tokens=20, top_p=1.0),
    "stages": StageBeam((3, 2, 1, 4), Judge("token"), temperature=(0.9, 0.0, 1.2, 0.7), max_new_tokens=(9, 30, 17, 5)),
    "stages by reasons": StageBeam((2, 1, 3, 3), RATIONALE, temperature=1.0, max_new_tokens=(9, 5, 17, 8)),
    "stages by a verifier": StageBeam((2, 3, 1, 4), Verifier(), temperature=1.0, max_new_tokens=(9, 5, 17, 8)),
    "weighted vote": WeightedVote(3, temperature=1.2, max_new_tokens=20, top_p=1.0),
    "own scorers": StageBeam(3, (LogProbability(), lambda i, q, s, t: [*map(len, t)], RATIONALE, RATIONALE), 0.9, 12),
}

BOTH = ("sample", "vote")
"""Strategies by which a question without an image is answered by another program too."""


@pytest.mark.parametrize("name", in_tiers(STRATEGIES, suite=["sample", "stages by reasons"]))
def test_answers_are_those_of_each_question_alone_bit_for_bit(ending, prompts, name):
    """Ten questions in three slots, in order and as they come, against each of them in slots of its own.

    Nothing compiles after the first answer. ``Reasoner.answer``, another program, gives the same texts.
    """
    reasoner = Reasoner(*ending, STRATEGIES[name], prompts)
    asked = questions(10)
    room = {"slots": SLOTS, "prompt_tokens": 128, "images": 1}
    stream = reasoner.answer_stream(asked, **room)
    answers, counter = [next(stream)], CompilationCounter()
    answers += stream
    assert [(each.index, each.error) for each in answers] == [(i, None) for i in range(10)]
    assert all(each.question is question for each, question in zip(answers, asked, strict=True))
    alone = [list(reasoner.answer_stream([question], **room)) for question in asked]
    for each, (one,) in zip(answers, alone, strict=True):
        assert plain(each.answer) == plain(one.answer)
    unordered = list(reasoner.answer_stream(asked, ordered=False, **room))
    assert [each.index for each in unordered] != list(range(10))
    for each in unordered:
        assert plain(each.answer) == plain(answers[each.index].answer)
    assert counter.count == 0
    assert len({each.answer.text for each in answers}) > 5
    if name == "own scorers":  # with which ``answer`` runs in slots
        return
    # The fourth has no image, for which ``answer`` compiles another program.
    for each, question in zip(answers[: 4 if name in BOTH else 3], asked, strict=False):
        assert each.answer.text == reasoner.answer(question.images, question.question, seed=question.seed).text


EVERY_SCORER = StageBeam(
    (3, 2, 4, 4),
    (Verifier(), LogProbability(), lambda i, q, s, t: [*map(len, t)], Judge("token")),
    temperature=1.0,
    max_new_tokens=(6, 5, 7, 4),
)
"""Every kind of scorer chooses in a stage."""


@pytest.fixture(scope="module")
def on_one_device(ending, prompts):
    """Answers to seven questions."""
    reasoner = Reasoner(*ending, EVERY_SCORER, prompts)
    return list(reasoner.answer_stream(questions(7), slots=SLOTS, prompt_tokens=128, images=1))


@pytest.mark.parametrize(
    ("mesh", "slots"),
    [pytest.param((2, 1, 2), 4, marks=pytest.mark.slow), pytest.param((1, 4, 2), 3, marks=EXHAUSTIVE)],
    ids=str,
)
def test_a_mesh_answers_as_one_device_does(ending, prompts, mesh, slots, on_one_device):
    """Slots, and rows of candidates, are sharded where the mesh divides them. Each piece compiles once."""
    model, processor = ending
    reasoner = Reasoner(on(make_mesh(*mesh), model), processor, EVERY_SCORER, prompts)
    names = ("init_slots", "admit", "start_stage", "decode", "choose", "read_candidates", "keep")
    compiled = {name: getattr(slot_pieces, name)._cache_size() for name in names}
    found = list(reasoner.answer_stream(questions(7), slots=slots, prompt_tokens=128, images=1))
    assert {name: getattr(slot_pieces, name)._cache_size() - compiled[name] for name in names} == dict.fromkeys(
        names, 1
    )
    for each, other in zip(found, on_one_device, strict=True):
        assert each.answer.text == other.answer.text
        assert winners(each) == winners(other)
    assert len({each.answer.text for each in found}) > 5


def winners(streamed) -> list[int]:
    return [stage.winner for stage in streamed.answer.trace.stages]


@pytest.mark.slow
def test_slots_that_are_done_save_decoding_steps(ending, prompts):
    """The steps are at least those of the longest question, and fewer than those of batches of as many questions."""
    reasoner = Reasoner(*ending, STRATEGIES["stages"], prompts)
    stream = reasoner.answer_stream(questions(12), slots=SLOTS, prompt_tokens=128, images=1)
    answers = list(stream)

    def steps(answer) -> list[int]:
        return [max(c.tokens + (c.ended == "eos") for c in stage.candidates) - 1 for stage in answer.trace.stages]

    drawn = np.array([steps(each.answer) for each in answers])  # [questions, stages]
    one_by_one = drawn.sum()
    batches = sum(drawn[i : i + SLOTS].max(axis=0).sum() for i in range(0, 12, SLOTS))
    assert max(drawn.sum(axis=1).max(), one_by_one / SLOTS) <= stream.decoding_steps < batches


@pytest.mark.slow
def test_the_stream_is_taken_as_far_as_slots_are_free(sampler):
    """An endless iterator gives answers; it is never more than the slots, the one that waits and the answers ahead."""
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield Question(scene(0)[1], seed=i)

    stream = sampler.answer_stream(endless(), slots=SLOTS)
    assert taken == []
    for given in range(20):
        assert next(stream).index == given
        assert len(taken) <= given + 1 + (WAITING_PER_SLOT + 1) * SLOTS


@pytest.mark.slow
def test_answers_do_not_pile_up_behind_one_that_takes_long(sampler, monkeypatch):
    """The number of questions that are begun before an answer is given is bounded, where it would not be otherwise."""
    most = {}
    for waiting in (0, 1, 1000):
        monkeypatch.setattr(module, "WAITING_PER_SLOT", waiting)
        taken: list[int] = []
        asked = (taken.append(i) or Question("What?", seed=i) for i in range(60))
        stream = sampler.answer_stream(asked, slots=SLOTS)
        most[waiting] = max(len(taken) - each.index for each in stream)
    assert most[0] <= SLOTS < most[1] <= 2 * SLOTS < most[1000]


@pytest.mark.slow
def test_an_exception_of_the_iterator_comes_after_the_answers_before_it(sampler):
    def broken():
        yield from questions(5)
        raise ConnectionError("the list of questions is gone")

    for ordered in (True, False):
        stream = sampler.answer_stream(broken(), slots=SLOTS, ordered=ordered, prompt_tokens=128, images=1)
        given = []
        with pytest.raises(ConnectionError, match="the list of questions is gone"):
            for each in stream:
                given.append(each)
        assert sorted(each.index for each in given) == list(range(5))
        assert all(each.answer for each in given)
        with pytest.raises(StopIteration):
            next(stream)


UNUSABLE = {
    "a missing image": (Question("What?", "missing.png"), "missing.png"),
    "no image": (Question("What?", b"not an image"), "image"),
    "a special token": (Question("What?<|image|>"), "<|image|>"),
    "no text": (Question(3), "a question is 3; it must be a text"),
    "a seed": (Question("What?", seed=-1), "seed is -1"),
    "too long": (Question("word " * 1500), "tokens"),
    "no question": ("What?", "a question of the stream is 'What\\?'; give Question"),
}


@pytest.mark.slow
def test_questions_that_cannot_be_encoded_are_told_in_their_places(sampler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = questions(len(UNUSABLE) + 1)
    wrong = [question for question, _ in UNUSABLE.values()]
    mixed = [x for pair in zip(good, wrong, strict=False) for x in pair] + [good[-1]]
    found = list(sampler.answer_stream(mixed, slots=SLOTS, prompt_tokens=128, images=1))
    assert [each.index for each in found] == list(range(len(mixed)))
    for each, (question, message) in zip(found[1::2], UNUSABLE.values(), strict=True):
        assert each.answer is None and each.question is question
        assert isinstance(each.error, UserError) and "\n" not in str(each.error)
        with pytest.raises(UserError, match=message):
            raise each.error
    expected = list(sampler.answer_stream(good, slots=SLOTS, prompt_tokens=128, images=1))
    for each, other in zip(found[::2], expected, strict=True):
        assert plain(each.answer) == plain(other.answer)


@pytest.mark.slow
def test_what_a_scorer_does_wrong_is_told_of_its_question_alone(ending, prompts):
    def scorer(images, question, stage, texts):
        return [0.0] * (len(texts) - ("wrong" in question))

    reasoner = Reasoner(*ending, BestOfN(2, scorer, max_new_tokens=9), prompts)
    asked = [Question(f"What is {word}?", seed=3) for word in ("right", "wrong", "left", "wrong", "up")]
    found = list(reasoner.answer_stream(asked, slots=2))
    assert [each.answer is None for each in found] == [False, True, False, True, False]
    assert "of the question (What is wrong?), returned 1 scores for 2 texts" in str(found[3].error)


@pytest.mark.slow
def test_logits_that_are_not_finite_are_told_of_their_question_alone():
    """A token without a number in its embedding spoils the answer of the question that has it, and no other."""
    model, processor = random_model(1, eos=tuple(range(0, 500, 60)))
    prompts = (processor.prompt(user_turn(question, 0)) for question in ("What? red", "What?"))
    spoilt, whole = (set(token_ids(processor, prompt)) for prompt in prompts)
    table = model.language_model.model.embed_tokens.weight
    table.set_value(table.get_value().at[jnp.array(sorted(spoilt - whole))].set(np.nan))
    reasoner = Reasoner(model, processor, Greedy(4))
    found = list(reasoner.answer_stream([Question("What?"), Question("What? red"), Question("What?")], slots=1))
    assert [each.error is None for each in found] == [True, False, True]
    assert found[0].answer.text == found[2].answer.text  # in the slot that had numbers that are not finite
    assert " in the stage whole of the question," in str(found[1].error)


@pytest.mark.slow
def test_slots_grow_for_longer_prompts_and_more_images(sampler, warnings_of):
    """The answers before are given first; a warning names the room to ask for. With that room, the texts are these."""
    image, question = scene(0)
    asked = [
        Question(question, image),
        Question(question, image, seed=1),
        Question(question + " red" * 120, image),
        Question(question, [image, image]),
        Question(question, None),
    ]
    found = list(sampler.answer_stream(asked, slots=SLOTS))
    assert [each.error for each in found] == [None] * 5
    grown = "the slots grow to prompts of {} tokens with {} images, which compiles the search anew: give these as "
    assert [line.partition("prompt_tokens")[0] for line in warnings_of.messages] == [
        grown.format(256, 1),
        grown.format(256, 2),
    ]
    at_once = sampler.answer_stream(asked, slots=SLOTS, prompt_tokens=256, images=2)
    assert [each.answer.text for each in found] == [each.answer.text for each in at_once]
    assert len(warnings_of.messages) == 2 and len({each.answer.text for each in found}) == 5


@pytest.mark.slow
def test_a_default_length_fits_every_prompt_of_the_bucket(ending):
    """The default is shrunk once, for the longest prompt that the slots hold, so that no other length compiles."""
    reasoner = Reasoner(*ending, StageBeam(1))
    stream = reasoner.answer_stream([Question("What?"), Question("What?" * 20)], slots=1, prompt_tokens=128)
    answers, counter = [next(stream)], CompilationCounter()
    answers += stream
    assert counter.count == 0
    lengths = {each.answer.trace.strategy.partition("max_new_tokens=")[2].partition(",")[0] for each in answers}
    assert len(lengths) == 1 and int(lengths.pop()) < 1024 // 4


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_questions(sampler, monkeypatch):
    """From the tenth answer to the fortieth, the bytes differ by what the slots, and one question ahead, may hold."""
    admit, sizes, one = SlotSearch.admit, [], 0

    def measure(self, *arguments):
        nonlocal one
        admit(self, *arguments)
        held = [(each.requests.inputs, each.progress) for each in self._occupants if each]
        one = max(one, *(sum(x.nbytes for x in jax.tree.leaves(each)) for each in held))

    monkeypatch.setattr(SlotSearch, "admit", measure)
    for each in sampler.answer_stream(questions(41), slots=SLOTS, prompt_tokens=128, images=1):
        if each.index % 10 == 0 and each.index:
            gc.collect()
            sizes.append(sum(x.nbytes for x in jax.live_arrays()))
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= (SLOTS + 1) * one < 30 * one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": 3}, "questions is 3; give an iterable of Question"),
        ({"slots": 0}, "slots is 0; it must be at least 1"),
        ({"ordered": 1}, "ordered is 1; it must be True or False"),
        ({"prompt_tokens": 2.5}, "prompt_tokens is 2.5"),
        ({"images": -1}, "images is -1; it must be at least 0"),
        ({"prompt_tokens": 2000}, "more than the context of 1024"),
    ],
)
def test_arguments_that_cannot_be_used(sampler, arguments, message):
    with pytest.raises(UserError, match=message):
        sampler.answer_stream(**{"questions": [], **arguments})


@pytest.mark.slow
def test_no_question_has_no_answer(sampler):
    assert list(sampler.answer_stream([])) == []
