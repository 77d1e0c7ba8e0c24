"""Every public name of the package answers a value of a wrong type with one line, before anything is computed."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import llava_cot_jax
from llava_cot_jax import (
    AnswerStream,
    Generator,
    Greedy,
    Judge,
    Mllama,
    MllamaConfig,
    Processor,
    Question,
    Reasoner,
    Sampling,
    StageBeam,
    StageFormat,
    TextConfig,
    UserError,
    VisionConfig,
    causal_lm_loss,
    find_stages,
    make_mesh,
    user_turn,
)
from tests.search.models import random_model

HALF = "broken \ud83d text"
"""A text with half of a character, as JSON that was cut in two has it."""


@pytest.fixture(scope="module")
def small() -> tuple[Mllama, Processor]:
    return random_model(0)


def ask(question: Any = "red?", image: Any = None, **settings: Any) -> Callable[..., Any]:
    return lambda model, processor: Reasoner(model, processor, Greedy(4)).answer(image, question, **settings)


def ask_all(images: Any, questions: Any, **settings: Any) -> Callable[..., Any]:
    return lambda model, processor: Reasoner(model, processor, Greedy(4)).answer_batch(images, questions, **settings)


def generate(inputs: Any, **settings: Any) -> Callable[..., Any]:
    return lambda model, processor: Generator(model).generate(inputs, **{"max_new_tokens": 4, **settings})


def _error_of(stream: AnswerStream) -> None:
    """Raise the error of the first answer of a stream."""
    raise next(stream).error


def complete(**settings: Any) -> Callable[..., Any]:
    return lambda model, processor: Generator(model, processor=processor).complete(IDS, max_new_tokens=4, **settings)


IDS = {"input_ids": [[1, 2, 3]]}

WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "a strategy's name": (lambda m, p: Reasoner(m, p, "stage_beam"), "search is 'stage_beam'; it must be a strategy"),
    "a strategy's class": (lambda m, p: Reasoner(m, p, StageBeam), r"give an object of it: StageBeam\(\)"),
    "model and processor exchanged": (lambda m, p: Reasoner(p, m), "model is a Processor; give an Mllama"),
    "a folder for a processor": (lambda m, p: Reasoner(m, "folder"), "processor is 'folder'; give the Processor"),
    "prompts of a judge": (lambda m, p: Reasoner(m, p, Greedy(), judge_prompts=3), "a path is 3; name a file"),
    "no question": (ask(None), "a question is None; it must be a text"),
    "half a character": (ask(HALF), r"a question has no valid character at position 7 \('\\ud83d'\)"),
    "a number for an image": (ask(image=3), "an image is 3; give a path"),
    "an array of floats": (ask(image=np.zeros((4, 4, 3))), r"an array of float64 \[4, 4, 3\]; give a path"),
    "channels first": (ask(image=np.zeros((3, 8, 8), np.uint8)), r"an array of uint8 \[3, 8, 8\]"),
    "an empty array": (ask(image=np.zeros((0, 4, 3), np.uint8)), "has no pixels"),
    "an image inside jit": (
        lambda m, p: jax.jit(lambda image: Reasoner(m, p, Greedy(2)).answer(image, "red?").text)(
            np.zeros((4, 4, 3), np.uint8)
        ),
        "an image is a .*Tracer that cannot be made an array of NumPy; give a path",
    ),
    "None among images": (ask(image=[None]), "an image is None; give a path"),
    "a text for a question of a stream": (
        lambda m, p: _error_of(Reasoner(m, p, Greedy(4)).answer_stream(["red?"])),
        r"a question of the stream is 'red\?'; give Question\(text, images\)",
    ),
    "a number in a question of a stream": (
        lambda m, p: _error_of(Reasoner(m, p, Greedy(4)).answer_stream([Question(3)])),
        "a question is 3; it must be a text",
    ),
    "one question for a stream": (
        lambda m, p: Reasoner(m, p, Greedy(4)).answer_stream(Question("red?")),
        "questions is a Question; give an iterable of Question",
    ),
    "a seed that is a text": (ask(seed="7"), "seed is '7'; it must be a whole number"),
    "progress told to no function": (ask(on_progress=3), "on_progress is 3; it must be a function that takes a Search"),
    "a seed that is no number": (ask(seed=None), "seed is None; it must be a whole number"),
    "another number of seeds": (ask_all([None] * 3, ["a"] * 3, seeds=[1, 2]), "2 seeds for 3 prompts"),
    "questions that are a text": (ask_all([None], "a"), "give a list of questions"),
    "images that are none": (ask_all(None, ["a"]), "give a list of questions, and as many images"),
    "None among questions": (ask_all([None, None], ["a", None]), "a question is None"),
    "sampling by name": (lambda m, p: Generator(m, "greedy"), "sampling is 'greedy'; give a Sampling"),
    "no model": (lambda m, p: Generator(None), "model is None; give an Mllama"),
    "no inputs": (generate(None), "inputs is None; give the arrays by name"),
    "inputs without ids": (generate({}), "input_ids are missing"),
    "ids of unequal rows": (generate({"input_ids": [[1, 2], [3]]}), "input_ids cannot be made an array"),
    "ids that are texts": (generate({"input_ids": [["a"]]}), "input_ids is .*; it must be an array of numbers"),
    "ids that are floats": (generate({"input_ids": [[1.0]]}), "input_ids is an array of float64"),
    "a length that is no number": (generate(IDS, max_new_tokens="9"), "max_new_tokens is '9'"),
    "a length between numbers": (generate(IDS, max_new_tokens=9.5), "max_new_tokens is 9.5"),
    "seeds that are a text": (generate(IDS, seeds="12"), "seed is '12'; it must be a whole number"),
    "text without a processor": (lambda m, p: Generator(m).complete(IDS, max_new_tokens=2), "needs the processor"),
    "a stop string that is none": (complete(stop=[3]), "a stop string is 3; it must be a text"),
    "stop strings that are none": (complete(stop=3), "stop is 3; give a text, or a list"),
    "an empty stop string": (complete(stop=""), "a stop string is empty"),
    "a folder for a generator's processor": (lambda m, p: Generator(m, processor="x"), "processor is 'x'; give the"),
    "a call with a text": (lambda m, p: m("hello"), "input_ids is 'hello'; it must be an array of numbers"),
    "messages that are a text": (lambda m, p: p.prompt("hi"), "messages is 'hi'; give a list of messages"),
    "one message": (lambda m, p: p.prompt({"role": "user", "content": "hi"}), "give a list of messages"),
    "None among messages": (lambda m, p: p.prompt([None]), "a message must be a mapping.*; one is None"),
    "a message of nothing": (lambda m, p: p.prompt([{"role": "user", "content": None}]), "it is None"),
    "half a character in a message": (lambda m, p: p.prompt([{"role": "user", "content": HALF}]), "no valid character"),
    "None among prompts": (lambda m, p: p(["a", None]), "prompt 1 is None; it must be a text"),
    "half a character in a prompt": (lambda m, p: p([HALF]), "prompt 0 has no valid character"),
    "images of prompts": (lambda m, p: p(["a"], "b"), "images is 'b'; give a list"),
    "a padded length": (lambda m, p: p(["a"], length="long"), "length is 'long'"),
    "ids of two texts": (lambda m, p: p.decode([[1], [2]]), "give the token ids of one text"),
    "a text to decode": (lambda m, p: p.decode("abc"), "give the token ids of one text"),
    "a processor's parts": (lambda m, p: Processor("a", "b"), "config is 'a'; give the MllamaConfig"),
    "a processor's tokenizer": (lambda m, p: Processor(m.config, "b"), "tokenizer is 'b'; give a fast tokenizer"),
    "a processor from nothing": (lambda m, p: Processor.from_pretrained(None), "a path is None"),
    "a model from nothing": (lambda m, p: Mllama.from_pretrained(None), "a path is None"),
    "a dtype": (lambda m, p: Mllama.from_pretrained("shapes", dtype="float99"), "dtype 'float99' are not supported"),
    "half a character in a dtype": (lambda m, p: Mllama.from_pretrained("shapes", dtype=HALF), "dtype 'broken "),
    "a layout to load": (lambda m, p: Mllama.from_pretrained("shapes", layout="flat"), "layout is 'flat'; it must be"),
    "a layout to change to": (lambda m, p: m.to_layout("flat"), "layout is 'flat'; it must be one of"),
    "a configuration to load": (lambda m, p: Mllama.from_pretrained("shapes", config="11b"), "config is '11b'; give"),
    "RoPE settings": (
        lambda m, p: MllamaConfig.from_dict(m.config.to_dict("float32") | {"text_config": {"rope_scaling": "llama3"}}),
        "text_config: rope_scaling is 'llama3'; it must be an object",
    ),
    "no prompts": (lambda m, p: m(np.zeros((0, 3), int)), r"with at least one token, got shape \[0, 3\]"),
    "prompts without tokens": (generate({"input_ids": np.zeros((1, 0), int)}), r"one token, got shape \[1, 0\]"),
    "tiles of another shape": (
        lambda m, p: m.vision_features(np.zeros((1, 3), np.uint8), np.zeros((1, 1), int)),
        r"pixel_values must have shape \[1, 3, 1, 3, .*, got \[1, 3\]",
    ),
    "tiles without ids": (
        lambda m, p: m.vision_features(np.zeros((1, 3), np.uint8), None),
        "pixel_values came without aspect_ratio_ids",
    ),
    "a default length": (lambda m, p: Generator(m, default_max_new_tokens="9"), "default_max_new_tokens is '9'"),
    "an id that is none": (lambda m, p: p.decode([2**40]), "1099511627776 is not the id of a token: this model has"),
    "a layout": (lambda m, p: Mllama(m.config, rngs=nnx.Rngs(0), layout="flat"), "layout is 'flat'; it must be one of"),
    "remat": (lambda m, p: Mllama(m.config, rngs=nnx.Rngs(0), remat=True), "remat is True; it must be one of"),
    "a seed for rngs": (lambda m, p: Mllama(m.config, rngs=0), r"rngs is 0; give flax.nnx.Rngs\(0\)"),
    "no rngs": (lambda m, p: Mllama(m.config), "give rngs"),
    "a model of a text": (lambda m, p: Mllama("11b"), "config is '11b'; give an MllamaConfig"),
    "saving to nothing": (lambda m, p: m.save_pretrained(None), "a path is None"),
    "parts of a configuration": (lambda m, p: MllamaConfig(text={}), "text is {}, a dict; give a TextConfig"),
    "a convention": (lambda m, p: MllamaConfig(convention=5), "unknown convention 5"),
    "published settings": (lambda m, p: MllamaConfig.from_dict([]), "published is .*; give the object"),
    "a width": (lambda m, p: TextConfig(hidden_size="4096"), "text hidden_size is '4096'; it must be a whole number"),
    "layers in a list": (lambda m, p: TextConfig(cross_attention_layers=[3]), r"\[3\], a list; it must be a tuple"),
    "an epsilon": (lambda m, p: VisionConfig(norm_eps=None), "vision norm_eps is None; it must be a finite number"),
    "canvases": (lambda m, p: VisionConfig(supported_aspect_ratios=((1, "1"),)), "supported_aspect_ratios is '1'"),
    "a format of nothing": (
        lambda m, p: StageFormat(None, ()),
        "the name of a stage format is None; it must be a text",
    ),
    "stages of a format in a list": (
        lambda m, p: StageFormat("mine", []),
        r"stages is \[\], a list; it must be",
    ),
    "stages of nothing": (lambda m, p: find_stages(None), "text is None; it must be a text"),
    "a mesh axis": (lambda m, p: make_mesh(data="2"), "mesh axis data is '2'; it must be a whole number"),
    "a turn of nothing": (lambda m, p: user_turn(None), "question is None; it must be a text"),
    "a negative number of images": (lambda m, p: user_turn("a", images=-1), "images is -1; it must be at least 0"),
    "labels that are no array": (
        lambda m, p: causal_lm_loss(np.zeros((1, 3, 9)), [[1, 2, 3]]),
        "labels is .*; it must",
    ),
    "labels of another shape": (
        lambda m, p: causal_lm_loss(np.zeros((1, 3, 9)), np.zeros((1, 4), int)),
        r"labels are int64 \[1, 4\]; logits \[1, 3, 9\] need integer labels \[1, 3\]",
    ),
    "an array for a choice": (lambda m, p: m.to_layout(np.zeros(3)), "layout is a ndarray; it must be one of"),
    "an array for a verdict": (lambda m, p: Judge(np.zeros(3)), "verdict is a ndarray; it must be one of"),
    "an array for a convention": (lambda m, p: MllamaConfig(convention=np.zeros(3)), "unknown convention a ndarray"),
    "an object for a convention": (lambda m, p: MllamaConfig(convention=object()), "unknown convention a object; one"),
    "an array for a path": (lambda m, p: Mllama.from_pretrained(np.zeros(3)), "a path is a ndarray; name a file"),
    "half a character in a path": (
        lambda m, p: MllamaConfig.from_pretrained(HALF),
        r"a path has the character '\\ud83d' at",
    ),
    "a null character in a path": (lambda m, p: m.save_pretrained("a\0b"), r"a path is 'a\\x00b'; it has a null char"),
    "the top folder to save to": (lambda m, p: m.save_pretrained("/"), "/ exists and is not empty"),
    "parameters of a model": (lambda m, p: Mllama(m.config, arrays=[1]), r"arrays is \[1\], a list; give the param"),
    "whether there are hidden states": (
        lambda m, p: m(IDS["input_ids"], output_hidden_states=np.zeros(3)),
        "output_hidden_states is a ndarray; it must be True or False",
    ),
    "a processor's configuration": (
        lambda m, p: Processor.from_pretrained("shapes", "11b"),
        "config is '11b'; give the MllamaConfig",
    ),
    "a number for devices": (lambda m, p: make_mesh(devices=4), "devices is 4; give a list of devices"),
    "numbers for devices": (lambda m, p: make_mesh(devices=[0]), r"devices is \[0\], a list; give a list of devices"),
    "a seed in an array of texts": (generate(IDS, seeds=np.array("7")), "seed is a ndarray; it must be a whole number"),
    "layers within layers": (lambda m, p: TextConfig(cross_attention_layers=((3,),)), r"layers is \(3,\), a tuple; it"),
    "canvases of three sides": (
        lambda m, p: VisionConfig(supported_aspect_ratios=((1, 2, 3),)),
        "has .*; each must be a height and a width in tiles",
    ),
    "objects for ids": (lambda m, p: p.decode([object()]), "ids is a list; give the token ids of one text"),
    "ids inside jit": (
        lambda m, p: jax.jit(lambda ids: Generator(m).generate({"input_ids": ids}, max_new_tokens=2))(
            np.ones((1, 3), int)
        ),
        "input_ids has no values inside jax.jit, which generation needs: call it outside",
    ),
    "slots of a stream": (
        lambda m, p: Reasoner(m, p, Greedy(2)).answer_stream([Question("red?")], slots="two"),
        "slots is 'two'; it must be a whole number",
    ),
    "a temperature": (lambda m, p: Sampling("warm"), "temperature is 'warm'; it must be a finite number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_a_wrong_type(small, name):
    call, message = WRONG[name]
    with pytest.raises(UserError, match=message) as told:
        call(*small)
    assert "\n" not in str(told.value) and len(str(told.value)) < 250


def test_every_public_class_and_function_is_tried():
    """Those that only hold what the package gives, and the strategies, which ``test_hostile.py`` tries, are not."""
    tried = {name for call, _ in WRONG.values() for name in _names_in(call.__code__)}
    tried |= {name for helper in (ask, ask_all, generate) for name in _names_in(helper.__code__)}
    strategies = {
        "BestOfN",
        "Judge",
        "LogProbability",
        "MajorityVote",
        "Retracing",
        "Sample",
        "SentenceBeam",
        "StageBeam",
        "Verifier",
        "WeightedVote",
    }
    made_here = {"Answer", "AnswerStream", "Completion", "SearchSnapshot", "StreamedAnswer", "UserError"}
    assert set(llava_cot_jax.__all__) - made_here - strategies <= tried


def _names_in(code: Any) -> set[str]:
    inner = (_names_in(constant) for constant in code.co_consts if hasattr(constant, "co_names"))
    return set(code.co_names).union(*inner)


def test_lists_and_other_numbers_that_mean_the_same_are_taken(small):
    """Lists of ids, NumPy's numbers, and arrays of torch are no mistake."""
    import torch

    model, processor = small
    ids = processor([processor.prompt(user_turn("red?"))])["input_ids"]
    generator = Generator(model)
    want = generator.generate({"input_ids": ids}, max_new_tokens=3)
    for given, seeds in ((ids.tolist(), np.int64(0)), (torch.tensor(ids), np.zeros(1, np.int32)), (ids, range(1))):
        np.testing.assert_array_equal(generator.generate({"input_ids": given}, max_new_tokens=3, seeds=seeds), want)
