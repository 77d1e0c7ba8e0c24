"""The search sentence by sentence against one in plain Python, and its promise that it always ends."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from llava_cot_jax import generate
from llava_cot_jax.cli import CompilationCounter
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.decoding import EndReason
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.scorers import Judge, LogProbability, Verifier
from llava_cot_jax.search.sentence_beam import SentenceBeam
from llava_cot_jax.search.trace import _read_sentence
from llava_cot_jax.stage_format import LLAVA_COT, STAGES, StageFormat
from tests.search.brute_force_sentences import SentenceSearch
from tests.search.models import random_model, scene, trained_model
from tests.search.test_hostile import parrot
from tests.search.test_search import plain, recorded_results
from tests.tiers import in_tiers

RATIONALE = Judge("rationale", reason_tokens=5, temperature=1.1)


@pytest.fixture(scope="module")
def ending():
    """A random model that often ends a sentence: it likes marks, line breaks and words that begin with a space."""
    model, processor = random_model(1, eos=tuple(range(0, 500, 150)))
    weight = model.language_model.lm_head.weight
    marks = processor.tokenizer.convert_tokens_to_ids(["!", ".", "?", "Ċ", "ĊĊ", "Ġ", "Ġblue", "Ġstar"])
    weight.set_value(weight.get_value().at[jnp.array(marks)].multiply(3))
    return model, processor


def check_against_brute_force(monkeypatch, model, processor, strategy, prompts, image, question, seed):
    """Check that tokens, ends, verdicts, scores and winners are the same. Return the answer."""
    found = recorded_results(monkeypatch, "search_sentences")
    answer = Reasoner(model, processor, strategy, prompts).answer(image, question, seed=seed)
    want = SentenceSearch(model, processor, strategy, image, question, seed, JudgePrompts.load(prompts)).run()
    tokens = jax.device_get(found[0].candidates.tokens)
    assert [stage.stage for stage in answer.trace.stages] == [f"sentence {i + 1}" for i in range(len(want))]
    for number, (stage, expected) in enumerate(zip(answer.trace.stages, want, strict=True)):
        for i, (one, other) in enumerate(zip(stage.candidates, expected.candidates, strict=True)):
            assert tokens[number, 0, i, : one.tokens].tolist() == other.ids, (number, i)
            assert one.ended.replace("sentence", "tag") == other.ended
            assert one.log_prob == pytest.approx(other.log_prob, abs=2e-3)
        votes = [verdict.vote for match in stage.matches for verdict in match.verdicts]
        assert votes == pytest.approx([verdict.vote for verdict in expected.verdicts], abs=1e-4)
        matches = [(match.first, match.second, match.decision, match.winner) for match in stage.matches]
        assert matches == [(match.first, match.second, match.decision, match.winner) for match in expected.matches]
        for one, (score, other) in zip(stage.candidates, expected.scores, strict=bool(expected.scores)):
            assert one.score == pytest.approx(score, abs=1e-4)
            assert one.other_probability == pytest.approx(other, abs=1e-4)
        assert stage.winner == expected.winner, number
    return answer


RANDOM = {
    "token": SentenceBeam(3, temperature=1.0, max_new_tokens=16, max_sentence_tokens=6, max_sentences=5, top_p=1.0),
    "verifier": SentenceBeam(2, Verifier(), 1.0, 16, max_sentence_tokens=6, max_sentences=4),
    "rationale": SentenceBeam(2, RATIONALE, 1.0, 14, max_sentence_tokens=5),
    "likelihood": SentenceBeam(2, LogProbability(), 1.2, 20, max_sentence_tokens=15, top_k=None),
}


@pytest.mark.parametrize("name", in_tiers(RANDOM, suite=["token", "rationale"]))
def test_a_random_model_searches_as_brute_force_does(ending, prompts, monkeypatch, name):
    image, question = scene(3)
    answer = check_against_brute_force(monkeypatch, *ending, RANDOM[name], prompts, image, question, seed=1)
    ends = [candidate.ended for stage in answer.trace.stages for candidate in stage.candidates]
    assert len(answer.trace.stages) > 2 and ends.count("sentence") > 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_trained_model_searches_as_brute_force_does(prompts, monkeypatch):
    """Its four stages are four sentences, as a blank line follows each, and the last closing tag ends the answer."""
    image, question = scene(1)
    strategy = SentenceBeam(2, Verifier(), temperature=1.3, max_new_tokens=110)
    answer = check_against_brute_force(monkeypatch, *trained_model(), strategy, prompts, image, question, seed=2)
    assert [stage.candidates[stage.winner].ended for stage in answer.trace.stages] == [*["sentence"] * 3, "tag"]
    assert list(answer.stages) == list(STAGES) and answer.conclusion == answer.stages["CONCLUSION"]


@pytest.mark.slow
def test_neighbours_and_places_change_nothing(ending, prompts):
    """Three questions whose answers have different numbers of sentences, one of them without an image: bit for bit."""
    reasoner = Reasoner(*ending, replace(RANDOM["verifier"], max_sentences=9), prompts)
    (image, first), (_, second), (other, third) = scene(0), scene(1), scene(2)
    asked = [(image, first, 3), (None, second, 4), (other, third, 6)]

    def ask(*places):
        images, questions, seeds = zip(*(asked[place] for place in places), strict=True)
        answers = reasoner.answer_batch(list(images), list(questions), seeds=list(seeds))
        return dict(zip(places, map(plain, answers), strict=True))

    straight, turned, doubled = ask(0, 1, 2), ask(2, 0, 1), ask(1, 1, 0)
    assert straight == turned
    assert all(doubled[place] == straight[place] for place in doubled)
    assert len({len(answer["trace"]["stages"]) for answer in straight.values()}) > 1
    assert len({answer["text"] for answer in straight.values()}) == 3


@pytest.mark.slow
def test_tokens_are_counted_once(ending, prompts):
    """Each winner but the last is read into the prefix, and other questions and seeds compile nothing."""
    reasoner = Reasoner(*ending, RANDOM["verifier"], prompts)
    trace = reasoner.answer(*scene(0)).trace
    won = [stage.candidates[stage.winner].tokens for stage in trace.stages]
    assert trace.tokens["winners"] == sum(won[:-1])
    drawn = [c.tokens + (c.ended == "eos") for stage in trace.stages for c in stage.candidates]
    assert trace.tokens["candidates"] == sum(drawn)
    assert trace.flops["winners"] > 0 and trace.flops["verifier_probes"] > 0
    compilations = CompilationCounter()
    assert len({reasoner.answer(*scene(i), seed=i).text for i in range(4)}) > 2
    assert compilations.count == 0


def bounded(model, processor, prompts, **settings):
    """Return the trace of an answer without an image, with the number of tokens of each of its sentences."""
    strategy = SentenceBeam(scorer=LogProbability(), temperature=0.0, **settings)
    trace = Reasoner(model, processor, strategy, prompts).answer(None, "red?").trace
    return trace, [stage.candidates[stage.winner].tokens for stage in trace.stages]


NEVER = {"a model that never ends a sentence": (" red", "a"), "a model that only writes line breaks": ("\n", "\n")}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEVER)
def test_an_answer_always_ends(prompts, name):
    """It has as many tokens, or as many sentences, as it may have, each as long as it may be."""
    text, then = NEVER[name]
    model, processor = parrot(text, then=then, after="\n\n")
    trace, tokens = bounded(model, processor, prompts, max_new_tokens=10, max_sentence_tokens=4)
    assert tokens == [4, 4, 2] and trace.forced_stages == {}
    assert {c.ended for stage in trace.stages for c in stage.candidates} == {"max_new_tokens"}
    _, tokens = bounded(model, processor, prompts, max_new_tokens=10, max_sentence_tokens=4, max_sentences=2)
    assert tokens == [4, 4]


@pytest.mark.slow
def test_a_model_that_ends_at_once(prompts):
    trace, tokens = bounded(*parrot("", then="", after="\n\n"), prompts, max_new_tokens=10)
    assert tokens == [0] and trace.stages[0].candidates[0].ended == "eos" and trace.whole_text == ""


@pytest.mark.slow
def test_a_sentence_that_was_cut_goes_on_in_the_next(prompts):
    """The mark is in one sentence and the space after it in the next, which so ends at once; the tag is cut too."""
    model, processor = parrot(" red. blue </CONCLUSION>", after="\n\n")
    length = len(processor.tokenizer(" red.", add_special_tokens=False)["input_ids"])
    trace, _ = bounded(model, processor, prompts, max_new_tokens=40, max_sentence_tokens=length)
    won = [stage.candidates[stage.winner] for stage in trace.stages]
    assert [(one.text, one.ended) for one in won[:2]] == [(" red.", "max_new_tokens"), (" blue", "sentence")]
    assert won[-1].ended == "tag" and "sentence" not in {one.ended for one in won[2:]}
    assert trace.whole_text == " red. blue </CONCLUSION>"


def test_texts_have_whole_characters():
    """The bytes of a character that are in two sentences belong to the second."""
    _, processor = random_model()
    ids = processor.tokenizer("no. é!", add_special_tokens=False)["input_ids"]
    half = len(ids) - 2
    assert processor.decode(ids[:half]).endswith("\ufffd")
    first = _read_sentence(processor, LLAVA_COT, "", ids[:half], EndReason.TAG)
    second = _read_sentence(processor, LLAVA_COT, "no. ", ids, EndReason.EOS)
    assert (first, second) == (("no. ", "sentence"), ("é!", "eos"))


SETTINGS = {
    "no candidates": (lambda: SentenceBeam(0), "num_candidates is 0; it must be at least 1"),
    "a tuple": (lambda: SentenceBeam((2, 2)), "num_candidates is .2, 2., a tuple; it must be a whole number"),
    "no sentences": (lambda: SentenceBeam(max_sentences=0), "max_sentences is 0; it must be at least 1"),
    "sentences without end": (lambda: SentenceBeam(max_sentences=None), "max_sentences is None; it must be"),
    "half a sentence": (lambda: SentenceBeam(max_sentence_tokens=0.5), "max_sentence_tokens is 0.5; it must be"),
    "no tokens": (lambda: SentenceBeam(max_sentence_tokens=0), "max_sentence_tokens is 0; it must be at least 1"),
    "no scorer": (lambda: SentenceBeam(scorer=None), "scorer is None; it must be"),
    "a class": (lambda: SentenceBeam(scorer=Verifier), r"give an object of it: Verifier\(\)"),
    "a function": (lambda: SentenceBeam(scorer=lambda *four: [0.0]), "calls no function: give Judge.., Verifier"),
    "heat": (lambda: SentenceBeam(temperature=-1), "temperature is -1; it must not be negative"),
    "a name": (lambda: SentenceBeam(format="mulberry"), "format is 'mulberry'; give a StageFormat"),
    "turns": (lambda: SentenceBeam(format=StageFormat.load("llamav_o1")), "in several turns, so that its answers"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_used(name):
    make, message = SETTINGS[name]
    with pytest.raises(UserError, match=message) as told:
        make()
    assert "\n" not in str(told.value)


def test_what_exceeds_the_context(prompts):
    """The default length shrinks, as far as the judge, who reads the answer so far, needs it too."""
    _, processor = random_model()
    for scorer in (Judge(), Verifier()):
        with pytest.raises(UserError, match=r"may take .* more than the context of 1024"):
            RequestBuilder(processor, SentenceBeam(scorer=scorer, max_new_tokens=1020), prompts).build([None], ["red?"])
        shrunk = RequestBuilder(processor, SentenceBeam(scorer=scorer), prompts).build([None], ["red?"])
        assert 500 < shrunk.spec.max_new_tokens[0] < 1000


def test_a_stream_is_refused(prompts):
    model, processor = random_model()
    reasoner = Reasoner(model, processor, SentenceBeam(scorer=LogProbability()), prompts)
    with pytest.raises(UserError, match=r"^SentenceBeam answers no stream of questions: ask with"):
        reasoner.answer_stream([])


def test_a_format_whose_last_stage_has_no_closing():
    """An answer ends with the model's turn alone."""
    _, processor = random_model()
    tables = RequestBuilder(processor, SentenceBeam(format=StageFormat.load("mulberry"))).stage_tables
    assert int(tables.stop_tables.max()) < 2 * tables.num_states


@pytest.mark.slow
def test_a_command_says_that_an_answer_was_cut(capsys, tmp_path, warnings_of):
    given = ["--search=sentence_beam", "--judge=log_probability", "--max_sentences=1", "--show_reasoning"]
    generate.main([*given, "--draw_to", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "<SUMMARY>" in shown and "<CAPTION>" not in shown
    said = "the answer was cut at the limit of sentences: give a higher --max_sentences for the rest"
    assert warnings_of.messages == [said]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max_sentences=3"], "--max_sentences needs a search: give --search too"),
        (["--search=stage_beam", "--max_sentence_tokens=3"], "--max_sentence_tokens has no meaning for --search stage"),
        (["--search=sentence_beam", "--max_new_tokens=[3, 4]"], "--max_new_tokens takes one value"),
        (["--search=sentence_beam", "--max_sentences=0"], "max_sentences is 0; it must be at least 1"),
    ],
)
def test_options_that_cannot_be_used(given, message):
    with pytest.raises(UserError, match=message):
        generate.main(given)
