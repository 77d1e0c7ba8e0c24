"""Faults of models, questions and settings: each search has an answer that shows the fault, or a clear error."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS, JudgePrompts
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.request_builder import LENGTH_STEP, RequestBuilder
from llava_cot_jax.search.scorers import Judge, LogProbability
from llava_cot_jax.search.strategies import BestOfN, Greedy, MajorityVote, Sample, StageBeam
from llava_cot_jax.search.tables import build_judge_tables, build_verifier_tables, scored_stages, vocabulary_of
from llava_cot_jax.stage_format import STAGES
from tests.search.models import TRAINED_BEAM, random_model, scene, tagged_processor, trained_model


def parrot(text: str, *, then: str = "a", after: str = "<CONCLUSION>", processor: Processor | None = None):
    """Return a model that writes ``text`` after a tag or a text, and then repeats ``then``, or ends if it is "".

    Its layers add nothing, so that the next token depends on the last one alone.
    """
    model, plain = random_model(0)
    processor = processor or plain

    def tokens(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    for layer in model.language_model.model.layers.values():
        for room, name in (("self_attn", "o_proj"), ("cross_attn", "o_proj"), ("mlp", "down_proj")):
            if room in layer:
                weight = layer[room][name].weight
                weight.set_value(jnp.zeros_like(weight.get_value()))
    vocabulary, width = model.config.text.vocab_size, model.config.text.hidden_size
    rows = np.random.default_rng(0).normal(size=(vocabulary + 8, width)).astype(np.float32)
    head = np.zeros((vocabulary, width), np.float32)
    (last,) = tokens(then) if then else model.config.text.eos_token_ids[-1:]
    following = {last: last}
    for token, successor in itertools.pairwise([tokens(after)[-1], *tokens(text), last]):
        following.setdefault(token, successor)
    for token, successor in following.items():
        head[successor] += rows[token]
    model.language_model.model.embed_tokens.weight.set_value(jnp.asarray(rows))
    model.language_model.lm_head.weight.set_value(jnp.asarray(head))
    return model, processor


LONGEST = 12
"""Number of tokens that ``one_stage`` lets a candidate have. It is the same in all tests, which share one program."""


def one_stage(model, processor, prompts):
    strategy = StageBeam(2, temperature=0.0, max_new_tokens=LONGEST, stages=("CONCLUSION",))
    answer = Reasoner(model, processor, strategy, prompts).answer(None, "red?")
    return answer, answer.trace.stages[0].candidates[0]


TAGGED = {"SUMMARY": " red", "CAPTION": " blue", "REASONING": " green", "CONCLUSION": " square"}
"""Body of each stage of an answer in which no token occurs twice."""


@pytest.fixture(scope="module")
def tagged_parrot():
    """A model that writes a staged answer in a vocabulary whose tags are special tokens of their own."""
    answer = "".join(f"<{stage}>{body}</{stage}>" for stage, body in TAGGED.items())
    return parrot(answer, then="", after="\n\n", processor=tagged_processor())


@pytest.mark.slow
def test_tags_that_are_tokens_of_their_own_stand_in_a_greedy_answer(tagged_parrot):
    model, processor = tagged_parrot
    prompt = processor([processor.prompt(user_turn("red?"))])
    ids = Generator(model).generate(prompt, max_new_tokens=16)[0]
    assert processor.decode(ids) == "".join(f"<{stage}>{body}</{stage}>" for stage, body in TAGGED.items())
    assert ids[0] == processor.tokenizer.convert_tokens_to_ids("<SUMMARY>")


@pytest.mark.slow
def test_tags_that_are_tokens_of_their_own_end_the_stages_of_a_search(tagged_parrot, prompts):
    strategy = StageBeam(2, LogProbability(), temperature=0.0, max_new_tokens=6)
    answer = Reasoner(*tagged_parrot, strategy, prompts).answer(None, "red?")
    assert answer.stages == {stage: body.strip() for stage, body in TAGGED.items()}
    assert {c.ended for stage in answer.trace.stages for c in stage.candidates} == {"tag"}


@pytest.mark.slow
def test_a_model_that_never_closes_a_tag(prompts):
    answer, candidate = one_stage(*parrot(" red"), prompts)
    assert (candidate.ended, candidate.added) == ("max_new_tokens", " </CONCLUSION>")
    assert answer.trace.forced_stages == {"CONCLUSION": "max_new_tokens"}
    assert answer.text.startswith("<CONCLUSION> red") and answer.text.endswith(" </CONCLUSION>")


def test_a_model_that_closes_a_tag_at_once(prompts):
    answer, candidate = one_stage(*parrot(" </CONCLUSION>"), prompts)
    assert (candidate.ended, candidate.added, answer.conclusion) == ("tag", "", "")
    assert answer.trace.forced_stages == {}
    assert answer.text == "<CONCLUSION> </CONCLUSION>"


def test_a_model_that_ends_at_once(prompts):
    """The end-of-sequence token is in no text, and a closing tag is added."""
    answer, candidate = one_stage(*parrot("", then=""), prompts)
    assert (candidate.ended, candidate.text, candidate.tokens) == ("eos", "", 0)
    assert answer.trace.forced_stages == {"CONCLUSION": "eos"}
    assert answer.text == "<CONCLUSION> </CONCLUSION>"


def test_a_model_that_stops_within_the_tag(prompts):
    text = " red blue green yellow circle square star triangle one two </CONCLUSION>"
    model, processor = parrot(text)
    assert len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) == LONGEST + 1
    answer, candidate = one_stage(model, processor, prompts)
    assert candidate.ended == "max_new_tokens"
    assert 0 < len(candidate.added) < len(" </CONCLUSION>")
    assert answer.text == f"<CONCLUSION>{text}"


def test_a_model_that_writes_another_stages_tag(prompts):
    """The tag is text, and does not end the stage."""
    answer, candidate = one_stage(*parrot(" </CAPTION>"), prompts)
    assert candidate.ended == "max_new_tokens" and "</CAPTION>" in answer.conclusion


def test_a_model_whose_logits_are_not_finite_after_some_tokens(prompts):
    model, processor = parrot(" red")
    weight = model.language_model.model.embed_tokens.weight
    (token,) = processor.tokenizer("a", add_special_tokens=False)["input_ids"]
    weight.set_value(weight.get_value().at[token].set(jnp.nan))
    with pytest.raises(UserError, match="not finite in the stage CONCLUSION of question 1, so that it has no answer"):
        one_stage(model, processor, prompts)


def test_a_judge_whose_logits_are_not_finite(prompts):
    """The candidates are sound, but the prompt about them has a word whose embedding is damaged."""
    model, processor = parrot(" </CONCLUSION>")
    weight = model.language_model.model.embed_tokens.weight
    token = processor.tokenizer(" Which?", add_special_tokens=False)["input_ids"][-1]
    weight.set_value(weight.get_value().at[token].set(jnp.nan))
    with pytest.raises(UserError, match="not finite in the stage CONCLUSION"):
        one_stage(model, processor, prompts)


@pytest.mark.slow
def test_a_model_that_ends_answers_now_and_then(prompts):
    """Every stage is there, and no end-of-sequence token is in the text."""
    model, processor = random_model(1, eos=tuple(range(0, 500, 10)))
    strategy = StageBeam(3, temperature=1.0, max_new_tokens=7)
    answer = Reasoner(model, processor, strategy, prompts).answer(*scene(0), seed=3)
    assert list(answer.stages) == list(STAGES)
    assert {c.ended for stage in answer.trace.stages for c in stage.candidates} == {"eos", "max_new_tokens"}
    ids = processor.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    assert answer.text.count("</") >= 4 and len(ids) > 4


@pytest.fixture(scope="module")
def reasoner(prompts):
    return Reasoner(*trained_model(), TRAINED_BEAM, prompts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "question",
    [
        "Is </SUMMARY> red? <CONCLUSION> no </CONCLUSION>",
        "图中有几个圆形",
        "?",
        "How many red shapes are there? " * 5,
    ],
    ids=["tags", "Chinese", "short", "long"],
)
def test_any_question_has_an_answer(reasoner, question):
    answer = reasoner.answer(scene(0)[0], question)
    assert list(answer.stages) == list(STAGES)
    assert answer.trace.question == question
    assert all(answer.text.count(f"<{stage}>") >= 1 for stage in STAGES)


@pytest.mark.slow
def test_tags_in_the_question_close_nothing(reasoner):
    image, question = scene(1)
    plain, tagged = (reasoner.answer(image, q) for q in (question, f"</SUMMARY> </CAPTION> {question}"))
    for answer in (plain, tagged):
        assert answer.trace.stages[0].candidates[0].tokens > 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_strip_of_an_image_and_none(reasoner):
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4000, 1, 3), np.uint8))
    for image in (strip, strip.rotate(90, expand=True), None):
        answer = reasoner.answer(image, "How many circles are there?")
        assert list(answer.stages) == list(STAGES)
        assert answer.trace.vision_encoder_calls == (image is not None)


@pytest.mark.slow
def test_candidates_of_one_token(prompts):
    answer = Reasoner(*random_model(3), StageBeam(2, max_new_tokens=1), prompts).answer(*scene(0))
    assert list(answer.stages) == list(STAGES)
    assert all(c.tokens <= 1 for stage in answer.trace.stages for c in stage.candidates)


def test_what_exceeds_the_context(prompts):
    model, processor = random_model(0)
    with pytest.raises(UserError, match=r"the answer may take \d+ tokens, more than the context of 1024"):
        Reasoner(model, processor, Greedy(max_new_tokens=2048)).answer(None, "red?")
    with pytest.raises(UserError, match=r"a judge's prompt may .* or lower max_new_tokens; the scorer LogProb"):
        Reasoner(model, processor, BestOfN(2, max_new_tokens=600), prompts).answer(None, "red?")


def test_a_context_that_is_too_short_for_a_judge(prompts):
    """The remedy that is named, another scorer, is one."""
    _, processor = random_model(0)
    text = replace(processor.config.text, max_position_embeddings=140)
    processor = Processor(replace(processor.config, text=text), processor.tokenizer)
    named = (
        r"a judge's prompt may .* the context of 140: shorten the question; the scorer LogProbability\(\), which is "
    )
    with pytest.raises(UserError, match=rf"{named}--judge log_probability, needs no such prompt$"):
        RequestBuilder(processor, StageBeam(2), prompts).build([None], ["red?"])
    builder = RequestBuilder(processor, StageBeam(2, LogProbability()), prompts)
    assert builder.build([None], ["red?"]).spec.max_new_tokens < builder.spec.max_new_tokens


@pytest.mark.parametrize("stated", [None, 999])
@pytest.mark.parametrize(
    "strategy", [Greedy(), MajorityVote(3), StageBeam(2), BestOfN(2, Judge("rationale"))], ids=repr
)
def test_a_default_length_shrinks_to_what_the_context_leaves(prompts, strategy, stated):
    """The longest that is not refused when it is given, but for a step."""
    _, processor = random_model(0)
    builder = RequestBuilder(processor, strategy, prompts, stated)
    requests = builder.build([None], ["red?"])
    found = requests.spec.max_new_tokens
    assert set(found) == {found[0]} and 100 < found[0] < builder.spec.max_new_tokens[0]
    assert stated is None or builder.spec.max_new_tokens[0] == stated
    given = replace(strategy, max_new_tokens=found[0])
    again = RequestBuilder(processor, given, prompts, stated)
    assert again.build([None], ["red?"]).spec == again.spec and again.spec.max_new_tokens == found
    given = replace(strategy, max_new_tokens=found[0] + LENGTH_STEP)
    with pytest.raises(UserError, match="more than the context of 1024: shorten the question or lower max_new_tokens"):
        RequestBuilder(processor, given, prompts, stated).build([None], ["red?"])
    with pytest.raises(UserError, match=r"more than the context of 1024: shorten the question$"):
        builder.build([None], ["red? " * 600])


@pytest.mark.slow
def test_a_search_says_what_the_context_cut_off(prompts, caplog):
    """The rest of the context is less than a step here. The trace names the length."""
    model, processor = random_model(0, eos=(1,))
    prompt = len(processor.tokenizer(processor.prompt(user_turn("red?")), add_special_tokens=False)["input_ids"])
    model.config = replace(model.config, text=replace(model.config.text, max_position_embeddings=prompt + 6))
    answer = Reasoner(model, Processor(model.config, processor.tokenizer), Greedy(), prompts).answer(None, "red?")
    left = answer.trace.stages[0].candidates[0].tokens
    assert 3 < left <= 6 and answer.trace.strategy == f"Greedy(max_new_tokens={left})"
    said = (
        f"the answer: cut off after {left} tokens, which is what the prompt left of the model's context of {prompt + 6}"
    )
    assert caplog.messages == [said]


def test_what_cannot_be_asked(prompts):
    reasoner = Reasoner(*random_model(0), Greedy(max_new_tokens=4))
    with pytest.raises(UserError, match="as many images"):
        reasoner.answer_batch([None, None], ["red?"])
    with pytest.raises(UserError, match="special token"):
        reasoner.answer(None, "<|eot_id|>")
    with pytest.raises(UserError, match="seed is -1; it must be"):
        reasoner.answer(None, "red?", seed=-1)
    with pytest.raises(UserError, match="does not exist"):
        reasoner.answer("none.png", "red?")
    model, processor = random_model(0)
    model.to_layout("stacked")
    with pytest.raises(UserError, match="to_layout"):
        Reasoner(model, processor)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: StageBeam(0), "num_candidates is 0; it must be at least 1"),
        (lambda: StageBeam(max_new_tokens=(9, 9, 0, 9)), "max_new_tokens is 0; it must be at least 1"),
        (lambda: StageBeam((2, 2)), "num_candidates has 2 values for 4 stages"),
        (lambda: StageBeam(temperature=(0.1, 0.1, -1.0, 0.2)), "temperature"),
        (lambda: StageBeam(stages=("A", "A")), "different names"),
        (lambda: StageBeam(stages=()), "at least one"),
        (lambda: Sample(top_p=0.0), "top_p"),
        (lambda: MajorityVote(top_k=0), "top_k"),
        (lambda: Judge("loud"), "verdict"),
        (lambda: Judge(reason_tokens=0), "reason_tokens"),
        (lambda: Judge(temperature=-1), "temperature"),
        (
            lambda: StageBeam(4, scorer=lambda text: len(text)),
            r"takes \(text\); it must take \(images, question, stage",
        ),
        (lambda: StageBeam(scorer=(Judge(), LogProbability())), "scorer has 2 values for 4 stages"),
        (
            lambda: StageBeam(scorer={"SUMMARY": Judge()}),
            "scorer is for SUMMARY; it must have one scorer for each of SUM",
        ),
        (lambda: StageBeam(2, (Judge(), Judge("rationale")), stages=("A", "B")), "scorer has two different judges"),
        (lambda: BestOfN(scorer=(Judge(),)), "scorer is .*; it must be Judge"),
        (lambda: StageBeam(scorer="nonsense"), "scorer is 'nonsense'; it must be Judge"),
        (lambda: StageBeam(scorer=Judge), r"scorer is the class Judge; give an object of it: Judge\(\)"),
        (lambda: BestOfN(scorer=None), "scorer is None"),
        (lambda: BestOfN(scorer=len), r"scorer is the function len, which takes \(obj, /\); it must take \(images"),
        (lambda: StageBeam([4, 2, 2, 2]), "give one value, or a tuple with one for each stage"),
        (lambda: StageBeam(num_candidates=2.0), "num_candidates is 2.0; it must be a whole number"),
        (lambda: StageBeam((2, 2, None, 2)), "num_candidates is None"),
        (lambda: StageBeam(temperature=(0.1, None, 0.1, 0.1)), "temperature is None"),
        (lambda: StageBeam(temperature=float("nan")), "temperature is nan; it must be a finite number"),
        (lambda: StageBeam(stages="SUMMARY"), "it must be a tuple of tags"),
        (lambda: StageBeam(stages=("A", 3), max_new_tokens=4), "a stage is 3; it must be a text"),
        (lambda: MajorityVote((2, 4)), "num_candidates is .2, 4., a tuple; it must be a whole number"),
        (lambda: Greedy("12"), "max_new_tokens is '12'"),
        (lambda: Greedy(True), "max_new_tokens is True"),
        (lambda: Sample(temperature="hot"), "temperature is 'hot'"),
        (lambda: Sample(top_k=2.5), "top_k is 2.5"),
        (lambda: Sample(top_p=None), "top_p is None"),
        (lambda: Judge(both_orders="no"), "both_orders is 'no'; it must be True or False"),
        (lambda: Judge(verdict=["token"]), "verdict is"),
    ],
)
def test_settings_that_cannot_be_used(make, named):
    """They are refused where they are given, in one line."""
    with pytest.raises(UserError, match=named) as told:
        make()
    assert "\n" not in str(told.value) and " at 0x" not in str(told.value)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("{question}", "", r"pair.text must have {question}, {earlier}, {first}, {second}, each once"),
        ("{first}", "{second} {first}", "each once and in this order"),
        ("  stem:", "  root:", r"prompts.yaml lacks 'stem'; compare it with .*judge_prompts.yaml$"),
        ("  whole: ", "  all: ", "criteria lack whole"),
        ('["1", "2"]', '["1"]', "pair.verdicts must be two different texts"),
        ("pair:", "pair: [", "is not YAML"),
        ("stages: [REASONING]", "stages: 5", "prompts.yaml has another form than a file of prompts: compare it with"),
        ("pair:", "pair: 5\nother:", "has another form than a file of prompts"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used(tmp_path, old, new, named):
    text = DEFAULT_JUDGE_PROMPTS.read_text()
    assert old in text
    path = tmp_path / "prompts.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=named) as told:
        JudgePrompts.load(path)
    assert str(told.value).startswith(f"{path}") and "Error" not in str(told.value)


def test_no_file_of_prompts(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml"):
        JudgePrompts.load(tmp_path / "none.yaml")


def test_a_stem_after_which_no_verdict_comes_naturally(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text(
        DEFAULT_JUDGE_PROMPTS.read_text().replace('verdicts: ["1", "2"]', "verdicts: [the first, the second]")
    )
    with pytest.raises(UserError, match="is not one natural next token"):
        Reasoner(*random_model(0), StageBeam(2), path)


@pytest.mark.slow
def test_each_field_of_the_file_changes_what_the_model_reads():
    _, processor = random_model(0)
    spec = StageBeam(2, Judge("rationale")).to_spec()
    token = StageBeam(2).to_spec()

    def tables(prompts, spec):
        judge, verifier = (
            build_judge_tables(processor, spec, spec.judge, prompts, vocabulary_of(processor)),
            build_verifier_tables(processor, scored_stages(spec), prompts),
        )
        return jax.tree.leaves((judge, verifier))

    prompts = JudgePrompts.load()
    changed = {
        "text": {**prompts.text, "pair": prompts.text["pair"] + " Now."},
        "readings": {**prompts.readings, "check": ("right", "wrong")},
        "stem": "I choose number ",
        "verdicts": ("3", "4"),
        "criteria": {**prompts.criteria, "CAPTION": "Short is good."},
        "earlier": " Before: ",
        "shows": {"CONCLUSION": ("SUMMARY",)},
        "checked": ("CAPTION",),
        "probe": replace(prompts.probe, questions={**prompts.probe.questions, "CAPTION": "Correct?"}),
    }
    assert set(changed) == set(JudgePrompts.__dataclass_fields__)
    for name, value in changed.items():
        other = replace(prompts, **{name: value})
        same = [
            len(a) == len(b) and all(x.shape == y.shape and (x == y).all() for x, y in zip(a, b, strict=True))
            for a, b in [(tables(prompts, p), tables(other, p)) for p in (spec, token)]
        ]
        assert not all(same), name
