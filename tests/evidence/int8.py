"""Measure what int8 weights change in the next token's distribution, with trained and with random weights.

    python tests/evidence/int8.py | tee tests/evidence/int8.txt

The figures are the KL divergence from bfloat16 to int8 in nats, its mean and its 99th percentile over tokens, and how
often the likeliest token is the same. The trained shapes model predicts every token of the answers to 64 held-out
questions. For it the script also prints how many conclusions are right, greedily decoded, in either dtype.
"""

import argparse
import datetime
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from llava_cot_jax.benchmark.inputs import random_model, random_search_inputs
from llava_cot_jax.benchmark.workload import RANDOM_MODELS, Workload
from llava_cot_jax.data.chat import Chat
from llava_cot_jax.data.settings import ChatSettings
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.evaluation.held_out import answer_held_out
from llava_cot_jax.evaluation.statistics import accuracy
from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.processor import Processor

ROWS = 64


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{datetime.date.today()}; jax {version('jax')}; {jax.devices()[0].device_kind}")
    processor, rows = Processor.from_pretrained("shapes"), ShapesRows("test")
    chat = Chat(processor, ChatSettings())
    talks = [chat.encode(rows.turns(i)[:1]) for i in range(ROWS)]
    batch = processor.collate([talk.ids for talk in talks], [[rows[i].images[0]] for i in range(ROWS)])
    trained = np.zeros(batch["input_ids"].shape, bool)
    for row, talk in zip(trained, talks, strict=True):
        row[: len(talk.ids) - 1] = np.asarray(talk.loss_mask)[1:]
    model = Mllama.from_pretrained("shapes", dtype="bfloat16")
    compare("trained shapes model", model, batch, trained, lambda: conclusions(model, processor, rows))

    wide = random_model("100m", jnp.bfloat16, None)
    given = {
        name: np.asarray(x)
        for name, x in random_search_inputs(RANDOM_MODELS["100m"](), Workload()).model_inputs.items()
    }
    compare("random, 100m", wide, given, np.ones(given["input_ids"].shape, bool), lambda: "")


def compare(name, model, batch, counted, extra) -> None:
    exact, before = log_softmax(model(**batch), counted), extra()
    model.quantize()
    rough, after = log_softmax(model(**batch), counted), extra()
    kl = (np.exp(exact) * (exact - rough)).sum(axis=-1)
    same = (exact.argmax(-1) == rough.argmax(-1)).mean()
    print(f"{name}: {len(kl)} tokens; KL {kl.mean():.2g}, 99th percentile {np.percentile(kl, 99):.2g}; ", end="")
    print(f"the likeliest token is the same for {same:.2%}")
    if before:
        print(f"  conclusions right: bfloat16 {before}, int8 {after}")


def log_softmax(logits, counted) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)[counted], axis=-1), np.float64)


def conclusions(model, processor, rows) -> str:
    answers = answer_held_out(Generator(model), processor, rows, range(512), 160)
    right, error = accuracy([answer.agrees("CONCLUSION") for answer in answers])
    return f"{right:.1%} of 512 (standard error {error:.1%})"


if __name__ == "__main__":
    main()
