"""Training of the verifier: its probabilities are those of the search, and its loss and gradient those of a formula."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.data.rows import FirstRows, Mixture
from llava_cot_jax.data.settings import ChatSettings, LoaderSettings
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.scorers import Verifier
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.training.step import loss_sums
from tests.search.models import scene, trained_model
from tests.value_files import searched_question, write_values

BEAM = StageBeam(3, Verifier(), temperature=2.0, max_new_tokens=(14, 30, 50, 9))
VALUES = [[0.25, 1.0, 0.5], [0.0, 0.75, 0.75], [1.0, 0.0, 0.25], [0.0, 1.0, 1.0]]


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> SimpleNamespace:
    """Searches of the trained model with the verifier, and a folder with values for their candidates."""
    model, processor = trained_model()
    images, questions = zip(*map(scene, range(3)), strict=True)
    answers = Reasoner(model, processor, BEAM).answer_batch(list(images), list(questions), seeds=[3, 4, 5])
    names = [f"images/{number}.png" for number in range(len(images))]
    lines = [searched_question(number, names[number], answer, VALUES) for number, answer in enumerate(answers)]
    folder = write_values(tmp_path_factory.mktemp("values") / "values", lines, dict(zip(names, images, strict=True)))
    return SimpleNamespace(model=model, processor=processor, answers=answers, folder=str(folder))


def batches(processor, rows, shuffle=False):
    """Yield the batches of an epoch."""
    settings = LoaderSettings(batch_size=8, num_buckets=1, pad_to_multiple_of=32, num_threads=1)
    device = SingleDeviceSharding(jax.devices()[0])
    loader = Loader(rows, processor, ChatSettings(), settings, device, shuffle=shuffle, cache=None)
    yield from loader.batches(0, loader.batches_per_epoch)


def reply_probabilities(config, **settings):
    """Return a function of parameters and a batch: the share of yes in yes and no, and the probability of others.

    The sums of training give both: they are linear in the weight of each row, and in its target.
    """

    def sums(inputs, params, batch):
        weight, value = inputs
        batch = {**batch, "probe_weight": weight, "probe_value": value}
        trained = flatten_dict(params, sep=".")
        found = loss_sums(trained, {}, batch, config=config, dtype=jnp.float32, remat="none", **settings)
        return found.probes.total, found.probes.other

    @jax.jit
    def probabilities(params, batch):
        ones = jnp.ones_like(batch["probe_weight"])
        (_, by_value), (others, _) = jax.jacrev(sums)((ones, ones), params, batch)
        return jax.nn.sigmoid(-by_value), others

    return probabilities


def scores_by_text(answers):
    """Return the candidates of searches by the question, the stage and their index."""
    return {
        (answer.trace.question, stage.stage, str(index + 1)): candidate
        for answer in answers
        for stage in answer.trace.stages
        for index, candidate in enumerate(stage.candidates)
    }


def check_probabilities(processor, rows, params, probabilities, answers) -> None:
    """Compare the probabilities that training computes with the scores of searches."""
    candidates, compared = scores_by_text(answers), set()
    for batch in batches(processor, rows):
        shares, others = probabilities(params, batch)
        for number, share, other in zip(batch["row"].tolist(), shares.tolist(), others.tolist(), strict=True):
            if number < 0:
                continue
            row = rows[number]
            stage, index = row.id.split(", ")[1].split(" ")
            if stage != "whole":
                candidate = candidates[row.turns[0].question, stage, index]
                assert share == pytest.approx(candidate.score, abs=1e-5), row.id
                assert other == pytest.approx(candidate.other_probability, abs=1e-5), row.id
                compared.add((stage, round(share, 3)))
    assert len(compared) >= 12 and len({stage for stage, _ in compared}) == 4


def test_probabilities_are_those_of_the_search(searched):
    rows, model = open_rows(searched.folder, "train"), searched.model
    assert len(rows) == 3 * (4 * 3 + 2)
    params = model.params
    check_probabilities(searched.processor, rows, params, reply_probabilities(model.config), searched.answers)


def test_loss_and_gradient_are_those_of_a_formula_over_the_logits(searched):
    """A batch with rows of values and of answers."""
    rows = Mixture((open_rows(searched.folder, "train"), FirstRows(ShapesRows("train"), 30)), (1.0, 1.0))
    batch = next(
        batch
        for batch in batches(searched.processor, rows, shuffle=True)
        if 2 < np.count_nonzero(batch["probe_weight"]) < 7
    )
    config = searched.model.config
    trained = flatten_dict(searched.model.params, sep=".")
    inputs = {
        name: x
        for name, x in batch.items()
        if not name.startswith("probe") and name not in ("loss_mask", "stage", "row")
    }
    last = batch["attention_mask"].sum(-1) - 1
    at = jnp.arange(len(last))

    def formula(trained):
        model = Mllama.from_arrays(config, dict(trained), layout="unrolled")
        logs = jax.nn.log_softmax(model(**inputs))
        yes, no = (logs[at, last, batch["probe_answers"][:, i]] for i in range(2))
        replies = -(batch["probe_value"] * yes + (1 - batch["probe_value"]) * no)
        mask = batch["loss_mask"][:, 1:]
        tokens = jnp.where(mask, batch["input_ids"][:, 1:], 0)  # an image's has no logit
        told = jnp.take_along_axis(logs[:, :-1], tokens[..., None], axis=-1)[..., 0]
        weights = batch["probe_weight"]
        return -(told * mask).sum() / mask.sum() + 0.3 * (replies * weights).sum() / weights.sum()

    def ours(trained):
        sums = loss_sums(trained, {}, batch, config=config, dtype=jnp.float32, remat="none")
        return sums.objective(0.3)

    (want, want_gradient), (got, gradient) = (jax.jit(jax.value_and_grad(f))(trained) for f in (formula, ours))
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for path, expected in want_gradient.items():
        size = np.abs(expected).max()
        np.testing.assert_allclose(gradient[path], expected, atol=1e-4 * size, rtol=1e-3, err_msg=path)
