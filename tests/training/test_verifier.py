"""Training of the verifier: its probabilities are those of the search, and its loss and gradient those of a formula."""

import json
from shutil import copytree
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding

from llava_cot_jax.answering_model import AnsweringModel
from llava_cot_jax.convert import main as convert
from llava_cot_jax.data.loader import Loader
from llava_cot_jax.data.rows import FirstRows, Mixture
from llava_cot_jax.data.settings import ChatSettings, LoaderSettings
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.data.shapes.tokenizer import shapes_tokenizer
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.checkpoint.adapter_settings import PROBE_DIGEST
from llava_cot_jax.model.checkpoint.auxiliary_files import write_auxiliary_files
from llava_cot_jax.model.layers import linear
from llava_cot_jax.model.mllama import Mllama, hidden_states
from llava_cot_jax.processing.probe import DEFAULT_JUDGE_PROMPTS, ProbePrompt
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.scorers import Verifier
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.training.step import loss_sums
from tests.search.models import random_model, scene
from tests.training.small_run import arguments, command, metrics
from tests.value_files import searched_question, write_values

BEAM = StageBeam(3, Verifier(), 3.0, (5, 3, 4, 2), top_p=1.0)  # so hot that no two candidates have the same text
VALUES = [[0.25, 1.0, 0.5], [0.0, 0.75, 0.75], [1.0, 0.0, 0.25], [0.0, 1.0, 1.0]]
NOT_INPUTS = ("loss_mask", "stage", "row", "probe", "probe_answers", "probe_value", "probe_weight")


COMMAND = {"adapter": None, "convention": None, "dtype": None, "judge_prompts": DEFAULT_JUDGE_PROMPTS}
"""Options of a command beside its checkpoint and the adapter of the verifier."""


def search(model, processor):
    """Return the answers to three questions, and their pictures."""
    images, questions = zip(*map(scene, range(3)), strict=True)
    return Reasoner(model, processor, BEAM).answer_batch(list(images), list(questions), seeds=[3, 4, 5]), images


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> SimpleNamespace:
    """Searches of a random model with the verifier, and a folder with values for their candidates.

    The model writes whole words alone, so that its texts have one tokenization.
    """
    model, processor = random_model()
    words = [token for token in range(model.config.text.vocab_size) if processor.decode([token])[1:].isalpha()]
    words = [token for token in words if processor.decode([token])[0] == " "]
    head = model.language_model.lm_head.weight
    head.set_value(jnp.zeros_like(head.get_value()).at[jnp.array(words)].set(head.get_value()[jnp.array(words)]))
    answers, images = search(model, processor)
    base = tmp_path_factory.mktemp("verifier")
    folder = write_searches(base / "values", answers, images)
    model.save_pretrained(base / "model")
    write_auxiliary_files(base / "model", model.config, shapes_tokenizer(), "float32")
    return SimpleNamespace(model=model, processor=processor, answers=answers, base=base, folder=folder)


def write_searches(folder, answers, images) -> str:
    """Write a folder of values for the candidates of searches."""
    names = [f"images/{number}.png" for number in range(len(images))]
    lines = [searched_question(number, names[number], answer, VALUES) for number, answer in enumerate(answers)]
    return str(write_values(folder, lines, dict(zip(names, images, strict=True))))


def batches(processor, rows, shuffle=False):
    """Yield the batches of an epoch."""
    settings = LoaderSettings(batch_size=8, num_buckets=1, pad_to_multiple_of=32, num_threads=1)
    device = SingleDeviceSharding(jax.devices()[0])
    loader = Loader(rows, processor, ChatSettings(), settings, device, shuffle=shuffle, cache=None)
    yield from loader.batches(0, loader.batches_per_epoch)


def check_scores(searched, folder, params, answers, **settings) -> None:
    """Compare the probabilities that training computes with the scores of searches.

    The sums of training give them: the slope of the loss in a row's target is log p(no) - log p(yes), and that of the
    probability of other tokens in a row's weight is this probability.
    """
    rows, config = open_rows(folder, "train"), searched.model.config
    candidates = {
        (answer.trace.question, stage.stage, str(index + 1)): candidate
        for answer in answers
        for stage in answer.trace.stages
        for index, candidate in enumerate(stage.candidates)
    }
    assert len(rows) == 3 * (4 * 3 + 2)

    def sums(inputs, batch):
        batch = {**batch, "probe_weight": inputs[0], "probe_value": inputs[1]}
        given = flatten_dict(params, sep=".")
        found = loss_sums(given, {}, batch, config=config, dtype=jnp.float32, remat="none", **settings)
        return found.probes.total, found.probes.other

    slopes, compared = jax.jit(jax.jacrev(sums)), set()
    for batch in batches(searched.processor, rows):
        ones = jnp.ones_like(batch["probe_weight"])
        (_, by_value), (others, _) = slopes((ones, ones), batch)
        shares = jax.nn.sigmoid(-by_value)
        for number, share, other in zip(batch["row"].tolist(), shares.tolist(), others.tolist(), strict=True):
            if number < 0:
                continue
            stage, index = rows[number].id.split(", ")[1].split(" ")
            if stage in ("SUMMARY", "CAPTION", "REASONING"):  # the search closes a conclusion that was cut otherwise
                candidate = candidates[rows[number].turns[0].question, stage, index]
                assert share == pytest.approx(candidate.score, abs=2e-5), rows[number].id
                assert other == pytest.approx(candidate.other_probability, abs=2e-5), rows[number].id
                compared.add((stage, round(share, 4)))
    assert len(compared) > 12 and len({stage for stage, _ in compared}) == 3


@pytest.mark.slow
def test_probabilities_are_those_of_the_search(searched):
    check_scores(searched, searched.folder, searched.model.params, searched.answers)


@pytest.mark.slow
def test_loss_and_gradient_are_those_of_a_formula_over_the_logits(searched):
    """A batch with rows of values and of answers."""
    rows = Mixture((open_rows(searched.folder, "train"), FirstRows(ShapesRows("train"), 30)), (1.0, 1.0))
    batch = next(
        batch
        for batch in batches(searched.processor, rows, shuffle=True)
        if 2 < np.count_nonzero(batch["probe_weight"]) < 7
    )
    config, trained = searched.model.config, flatten_dict(searched.model.params, sep=".")
    inputs = {name: x for name, x in batch.items() if name not in NOT_INPUTS}
    last = batch["attention_mask"].sum(-1) - 1
    at = jnp.arange(len(last))

    def formula(trained):
        logs = jax.nn.log_softmax(Mllama.from_arrays(config, dict(trained), layout="unrolled")(**inputs))
        yes, no = (logs[at, last, batch["probe_answers"][:, i]] for i in range(2))
        replies = -(batch["probe_value"] * yes + (1 - batch["probe_value"]) * no)
        mask, weights = batch["loss_mask"][:, 1:], batch["probe_weight"]
        tokens = jnp.where(mask, batch["input_ids"][:, 1:], 0)  # an image's has no logit
        told = jnp.take_along_axis(logs[:, :-1], tokens[..., None], axis=-1)[..., 0]
        return -(told * mask).sum() / mask.sum() + 0.3 * (replies * weights).sum() / (weights > 0).sum()

    def ours(trained):
        return loss_sums(trained, {}, batch, config=config, dtype=jnp.float32, remat="none").objective(0.3)

    (want, want_gradient), (got, gradient) = (jax.jit(jax.value_and_grad(f))(trained) for f in (formula, ours))
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for path, expected in want_gradient.items():
        size = np.abs(expected).max()
        np.testing.assert_allclose(gradient[path], expected, atol=1e-4 * size, rtol=1e-3, err_msg=path)


@pytest.fixture(scope="module")
def adapted(searched, cache):
    """The folder of a run that trained an adapter for the verifier alone, and the adapter."""
    held_out = str(copytree(searched.folder, searched.base / "held_out"))  # three images have no split of their own
    output, given = searched.base / "run", {"data": searched.folder, "validation_data": held_out, "steps": 6}
    given |= {"eval_examples": 8, "lora.rank": 2, "lora.alpha": 6, "lora.tokens": "probe"}
    given |= {"optimizer.learning_rate": 0.02, "optimizer.schedule": "linear"}
    done = command("train", *arguments(searched.base / "model", output, **given), cache=cache)
    assert done.returncode == 0 and "42 texts of 3 questions to ask the verifier about" in done.stdout, done.stderr
    convert([str(output), str(searched.base / "adapter"), "--for", "peft"])
    return output, searched.base / "adapter"


@pytest.mark.slow
def test_an_adapter_of_the_verifier_changes_its_scores_and_no_answer(searched, adapted):
    """Candidates are the same bit for bit, and training computes the probabilities of the search."""
    model = Mllama.from_pretrained(searched.base / "model", verifier_adapter=adapted[1])
    answers, images = search(model, searched.processor)
    moved = 0.0
    for before, after in zip(searched.answers, answers, strict=True):
        one, two = (answer.trace.stages[0].candidates for answer in (before, after))
        assert [(c.text, c.log_prob) for c in one] == [(c.text, c.log_prob) for c in two]
        moved = max(moved, *(abs(x.score - y.score) for x, y in zip(one, two, strict=True)))
    assert moved > 0.05
    folder = write_searches(searched.base / "adapted_values", answers, images)
    check_scores(searched, folder, model.params, answers, lora_tokens="probe")


@pytest.mark.slow
def test_an_adapter_acts_on_the_tokens_of_the_question_alone(searched, adapted):
    model = Mllama.from_pretrained(searched.base / "model", verifier_adapter=adapted[1])
    batch = next(batches(searched.processor, open_rows(searched.folder, "train")))
    states = jax.jit(lambda params, probe: hidden_states(params, model.config, batch, adapted=probe))
    with_adapter, without = (
        np.asarray(states(model.params, probe)) for probe in (batch["probe"], batch["probe"] & False)
    )
    probe = np.asarray(batch["probe"])
    before = np.asarray(batch["attention_mask"], bool) & ~probe
    np.testing.assert_array_equal(with_adapter[before], without[before])
    assert (with_adapter[probe] != without[probe]).any(axis=-1).all()
    np.testing.assert_array_equal(model(batch["input_ids"]), searched.model(batch["input_ids"]))


@pytest.mark.slow
def test_commands_ask_the_question_that_it_was_trained_for(searched, adapted, tmp_path):
    """An adapter of an earlier version, which does not tell its question, is taken as it is."""
    assert json.loads((adapted[1] / "adapter_config.json").read_text())[PROBE_DIGEST] == ProbePrompt.load().digest
    prompts = tmp_path / "mine.yaml"
    prompts.write_text(DEFAULT_JUDGE_PROMPTS.read_text().replace("Is this caption right?", "Is it?"))
    options = COMMAND | {"checkpoint": str(searched.base / "model"), "judge_prompts": str(prompts)}
    with pytest.raises(
        UserError, match=r"adapter was trained for another question .* that of .*mine.yaml: give as --judge"
    ):
        AnsweringModel.find(SimpleNamespace(**options, verifier_adapter=str(adapted[1])))
    silent = copytree(adapted[1], tmp_path / "silent")
    config = json.loads((silent / "adapter_config.json").read_text())
    del config[PROBE_DIGEST]
    (silent / "adapter_config.json").write_text(json.dumps(config))
    AnsweringModel.find(SimpleNamespace(**options, verifier_adapter=str(silent)))


@pytest.mark.slow
def test_commands_load_it_beside_weights_in_int8(searched, adapted):
    options = COMMAND | {
        "checkpoint": str(searched.base / "model"),
        "verifier_adapter": str(adapted[1]),
        "quantize": "int8",
    }
    found = AnsweringModel.find(SimpleNamespace(**options))
    assert found.digests.keys() == {"weights", "adapter_weights", "verifier_adapter_weights"}
    w = found.load(None, is_first=False).params["language_model"]["model"]["layers"]["0"]["mlp"]["up_proj"]
    assert w["weight"].dtype == jnp.int8
    x = jnp.linspace(-1, 1, w["lora_a"].shape[1])
    adds = linear(x, w) - linear(x, w, adapted=None)
    np.testing.assert_allclose(adds, x @ w["lora_a"].T @ w["lora_b"].T, atol=1e-5)
    assert np.abs(adds).max() > 1e-3


@pytest.mark.slow
def test_the_run_tells_how_the_verifier_learns(adapted):
    lines = metrics(adapted[0])
    first, last = ([line for line in lines if "verifier_loss" in line][i] for i in (0, -1))
    assert last["verifier_loss"] < 0.8 * first["verifier_loss"]
    assert last["verifier_other_probability"] < first["verifier_other_probability"]
    assert first["loss"] == pytest.approx(first["verifier_loss"]) and first["trained_tokens"] == 0
    (validation,) = [line for line in lines if "validation_loss" in line]
    assert validation["validation_verifier_loss"] == pytest.approx(validation["validation_loss"])
    assert 0 <= validation["validation_verifier_accuracy"] <= 1


@pytest.mark.slow
def test_adapters_are_refused_where_they_would_act_on_other_tokens(searched, adapted, tmp_path):
    output, folder = adapted
    assert json.loads((folder / "adapter_config.json").read_text())["llava_cot_verifier"] is True
    with pytest.raises(UserError, match="for the verifier's question alone, and would change every answer: give it as"):
        Mllama.from_pretrained(searched.base / "model", adapter=folder)
    with pytest.raises(UserError, match="merged it would change every answer: write it by --for peft"):
        convert([str(output), str(tmp_path / "whole")])
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    for path in folder.iterdir():
        (ordinary / path.name).write_bytes(path.read_bytes().replace(b'"llava_cot_verifier": true', b'"x": 1'))
    with pytest.raises(UserError, match="was trained for all tokens, not for the verifier's question alone"):
        Mllama.from_pretrained(searched.base / "model", verifier_adapter=ordinary)
    with pytest.raises(UserError, match="is for decoding: load it with the layout 'unrolled'"):
        Mllama.from_pretrained(searched.base / "model", verifier_adapter=folder, layout="stacked")
