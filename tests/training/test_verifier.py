"""Training of the verifier: its probabilities are those of the search, and its loss and gradient those of a formula."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.data.settings import ChatSettings, LoaderSettings
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.search.answers import join_stages, tagged_text
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.scorers import Verifier
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.stage_format import LLAVA_COT
from tests.search.models import scene, trained_model

BEAM = StageBeam(3, Verifier(), temperature=1.5, max_new_tokens=(14, 30, 50, 9))


def write_values(folder: Path, answers, images) -> None:
    """Write the candidates of searches as a folder of values, in which the values are drawn."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    with (folder / "values.jsonl").open("w") as file:
        for number, (answer, image) in enumerate(zip(answers, images, strict=True)):
            image.save(folder / f"images/{number}.png")
            won, stages = [], []
            for stage in answer.trace.stages:
                texts = [tagged_text(LLAVA_COT, stage.stage, candidate) for candidate in stage.candidates]
                candidates = [
                    {"text": text, "value": value / 4, "right": value, "continuations": 4, "score": candidate.score}
                    for text, candidate, value in zip(
                        texts, stage.candidates, draw.permutation(5)[: len(texts)].tolist(), strict=True
                    )
                ]
                stages.append({"stage": stage.stage, "before": join_stages(won), "candidates": candidates})
                won.append(texts[stage.winner])
            whole = [{"text": answer.text, "right": bool(right), "score": None} for right in (number % 2, 1)]
            row = {"id": f"q{number}", "question": answer.trace.question, "images": [f"images/{number}.png"]}
            row |= {"answer": "1", "match": "exact", "seed": number, "format": "llava_cot"}
            file.write(json.dumps(row | {"stages": stages, "answers": whole}) + "\n")


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> SimpleNamespace:
    """Searches of the trained model with the verifier, and a folder with their values."""
    model, processor = trained_model()
    images, questions = zip(*map(scene, range(4)), strict=True)
    answers = Reasoner(model, processor, BEAM).answer_batch(list(images), list(questions), seeds=[3, 4, 5, 6])
    folder = tmp_path_factory.mktemp("values") / "values"
    write_values(folder, answers, images)
    return SimpleNamespace(model=model, processor=processor, answers=answers, folder=folder)


def batches(searched, split="train", verifier=None, size=8):
    rows = open_rows(str(searched.folder), split, verifier)
    settings = LoaderSettings(batch_size=size, num_buckets=1, pad_to_multiple_of=32, num_threads=1)
    device = SingleDeviceSharding(jax.devices()[0])
    loader = Loader(rows, searched.processor, ChatSettings(), settings, device, shuffle=False, cache=None)
    return rows, list(loader.batches(0, loader.batches_per_epoch))


def test_probe(searched):
    rows, found = batches(searched)
    print(rows.summary, len(found))
    want = {}
    for answer in searched.answers:
        for stage in answer.trace.stages:
            for i, c in enumerate(stage.candidates):
                want[answer.trace.question, stage.stage, i] = c
    probabilities = jax.jit(lambda p, b: searched.model)
    from llava_cot_jax.model.mllama import _all_logits

    f = jax.jit(lambda p, b: _all_logits(p, searched.model.config, b, "none"))
    for b in found:
        logits = f(searched.model.params, b)
        for i, row in enumerate(b["row"].tolist()):
            if row < 0:
                continue
            r = rows[row]
            t = r.turns[0]
            idx = int(b["attention_mask"][i].sum()) - 1
            p = jax.nn.softmax(logits[i, idx])
            y, n = b["probe_answers"][i].tolist()
            s = float(p[y] / (p[y] + p[n]))
            _, stage, k = r.id.replace(",", "").split()
            if stage == "whole":
                continue
            c = want[t.question, stage, int(k) - 1]
            print(
                r.id,
                s,
                c.score,
                1 - p[y] - p[n],
                c.other_probability,
                c.ended,
                repr(c.text[-10:]),
                float(b["probe_value"][i]),
                float(b["probe_weight"][i]),
            )
    assert 0
