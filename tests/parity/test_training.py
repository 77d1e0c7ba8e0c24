"""One training step against transformers with torch's AdamW, on the same batch, in float32."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from llava_cot_jax.data.loader import Loader
from llava_cot_jax.data.rows import Row, Turn
from llava_cot_jax.data.settings import ChatSettings, LoaderSettings
from llava_cot_jax.model.config import CLIP_MEAN, CLIP_STD, MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.training.optimizer import Optimizer
from llava_cot_jax.training.settings import OptimizerSettings
from llava_cot_jax.training.state import TrainState, frozen_paths
from llava_cot_jax.training.step import loss_sums, make_train_step
from tests.data.rows import demo_processor
from tests.parity.reference import Sizes, batch_of_rows, published_weights, random_model, under
from tests.parity.test_transformers import CONVENTIONS, ours
from tests.tiers import EXHAUSTIVE

FLOOR = 1e-3
"""Share of a tensor's largest gradient: below it AdamW's first step, g / |g|, turns noise into a whole step."""

SETTINGS = OptimizerSettings(learning_rate=1e-3, weight_decay=0.1)
FROZEN = ["^vision_model", "embed_tokens"]


def batch_for(reference, seed: int, padding: str = "right") -> dict[str, np.ndarray]:
    """Rows with one image, two, none, and two apart; some answers in each, in several turns, of unequal length."""
    batch = batch_of_rows(reference.config, seed, padding)
    draw = np.random.default_rng(seed)
    trained = (draw.random(batch["input_ids"].shape) < 0.5) & (batch["input_ids"] < 120)
    trained &= batch["attention_mask"].astype(bool)
    trained &= np.roll(batch["attention_mask"], 1, axis=1).astype(bool) & (np.arange(trained.shape[1]) > 0)
    trained[2, :4] = False
    return {**batch, "loss_mask": trained, "stage": np.where(trained, draw.integers(0, 5, trained.shape), 0)}


def of_torch(reference, batch: dict[str, np.ndarray], frozen: set[str]) -> tuple[float, dict, dict]:
    """Loss, gradients and the change of parameters over the learning rate, by published name."""
    before = {name: value.copy() for name, value in published_weights(reference).items()}
    names = dict(zip(published_names(reference), reference.parameters(), strict=True))
    for name, parameter in names.items():
        parameter.requires_grad_(name not in frozen)
    trained = {name: p for name, p in names.items() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": SETTINGS.weight_decay},
            {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=SETTINGS.learning_rate,
    )
    inputs = {name: torch.tensor(x) for name, x in batch.items() if name not in ("loss_mask", "stage")}
    logits = reference(**inputs, use_cache=False).logits[:, :-1]
    chosen = torch.tensor(batch["loss_mask"][:, 1:])
    loss = torch.nn.functional.cross_entropy(logits[chosen], inputs["input_ids"][:, 1:][chosen])
    loss.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in trained.items() if p.grad is not None}
    optimizer.step()
    after = published_weights(reference)
    change = {name: (after[name] - before[name]) / SETTINGS.learning_rate for name in names}
    return loss.item(), gradients, change


def published_names(reference) -> list[str]:
    """Return the published names of the parameters, in their order, without those of buffers."""
    by_value = {id(p): name for name, p in reference.named_parameters()}
    keys = list(published_weights(reference))
    state = list(reference.state_dict())
    renamed = dict(zip(state, keys, strict=True))
    return [renamed[by_value[id(p)]] for p in reference.parameters()]


def by_tensor(arrays: dict[str, jax.Array], config: MllamaConfig) -> dict[str, np.ndarray]:
    """Arrays of the stacked layout by published name."""
    table = parameters(config, "stacked")
    found = {}
    for path, array in arrays.items():
        parts = np.asarray(array) if table[path].stacked else [np.asarray(array)]
        found |= dict(zip(table[path].tensors, parts, strict=True))
    return found


def begin(model: Mllama, frozen=(), settings: OptimizerSettings = SETTINGS) -> tuple[TrainState, Optimizer]:
    optimizer = Optimizer(settings, lambda step: settings.learning_rate, parameters(model.config, "stacked"))
    # Copied: the step donates its state.
    arrays = {path: jnp.array(array) for path, array in flatten_dict(model.params, sep=".").items()}
    rest = {path: arrays.pop(path) for path in frozen_paths(arrays, frozen)}
    return TrainState.init(arrays, rest, optimizer, settings.dtype), optimizer


def step_of(model: Mllama, optimizer: Optimizer, state: TrainState, **more):
    settings = {"mesh": None, "dtype": jnp.float32, "remat": "none"} | more
    return make_train_step(model.config, parameters(model.config, "stacked"), optimizer, state, **settings)


@pytest.mark.parametrize(
    ("seed", "padding", "frozen", "grad_accum_steps"),
    [
        pytest.param(0, "right", (), 1, marks=pytest.mark.slow),
        pytest.param(1, "left", FROZEN, 1, marks=EXHAUSTIVE),
        pytest.param(2, "right", FROZEN, 2, marks=EXHAUSTIVE),
        pytest.param(5, "left", (), 2, marks=EXHAUSTIVE),
    ],
)
def test_one_step(seed, padding, frozen, grad_accum_steps):
    reference = random_model(Sizes.draw(seed).hf_config(), seed)
    convention = CONVENTIONS[seed % 3]
    batch = batch_for(reference, seed, padding)
    model = ours(reference, convention, layout="stacked")
    still = {
        t
        for path in (frozen_paths(parameters(model.config, "stacked"), frozen) if frozen else ())
        for t in parameters(model.config, "stacked")[path].tensors
    }
    state, optimizer = begin(model, frozen)
    before = {**state.trained}
    count = batch["loss_mask"].sum()

    compute = functools.partial(loss_sums, config=model.config, dtype=jnp.float32, remat="full")
    gradient = jax.jit(jax.grad(lambda trained, batch: compute(trained, state.frozen, batch).total.sum() / count))
    gradients = by_tensor(gradient(state.trained, batch), model.config)
    held = by_tensor(before, model.config)
    with under(convention, reference):
        loss, wanted, changes = of_torch(reference, batch, still)
    state, measures = step_of(model, optimizer, state, grad_accum_steps=grad_accum_steps)(state, batch)
    assert float(measures["loss"]) == pytest.approx(loss, rel=1e-5)
    assert int(measures["tokens"]) == count
    assert measures["stage_tokens"].tolist() == np.bincount(batch["stage"][batch["loss_mask"]], minlength=5).tolist()

    assert set(gradients).isdisjoint(still) and set(wanted) <= set(gradients)
    after = by_tensor(state.trained, model.config)
    checked = 0
    for name, got in gradients.items():
        want = wanted.get(name, np.zeros_like(got))  # torch has none for what the loss does not reach
        largest = np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=1e-3 * largest, err_msg=name)
        above = np.abs(want) > FLOOR * largest
        change = (after[name] - held[name]) / SETTINGS.learning_rate
        np.testing.assert_allclose(change[above], changes[name][above], rtol=1e-3, err_msg=name)
        checked += above.sum()
    assert checked > 0.5 * sum(x.size for x in wanted.values())
    for name in still:
        assert not changes[name].any()
    assert set(by_tensor(state.frozen, model.config)) == still


SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(i, *size) for i, size in enumerate([(28, 28), (90, 20), (30, 70), (56, 56)])]


class FewRows:
    """Rows with no image (and a system's turn), one, and three: two before a question, and one before the next."""

    fingerprint = "few"
    _rows = (
        Row("0", "", (), (Turn("What is red?", "A colour.", system="Be brief."), Turn("And green?", "Another."))),
        Row("1", "", tuple(PICTURES[:1]), (Turn("How many shapes?", "There are three.", images=1),)),
        Row(
            "3",
            "",
            tuple(PICTURES[1:]),
            (Turn("Which is larger?", "The first one.", images=2), Turn("Is this red?", "No.", images=1)),
        ),
    )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def turns(self, index: int) -> tuple[Turn, ...]:
        return self._rows[index].turns


def said(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


# Each row in Llama 3.2's chat format, written out, with its images.
WRITTEN: list[tuple[list[Image.Image], list[tuple[str, str]]]] = [
    (
        [],
        [
            ("system", f"{SYSTEM}Be brief."),
            ("user", "What is red?"),
            ("assistant", "A colour."),
            ("user", "And green?"),
            ("assistant", "Another."),
        ],
    ),
    (PICTURES[:1], [("user", "<|image|>How many shapes?"), ("assistant", "There are three.")]),
    (
        PICTURES[1:],
        [
            ("user", "<|image|><|image|>Which is larger?"),
            ("assistant", "The first one."),
            ("user", "<|image|>Is this red?"),
            ("assistant", "No."),
        ],
    ),
]


@pytest.mark.slow
def test_rows_with_no_image_one_and_three(tmp_path):
    """Batches of the loader give the loss and gradient that transformers gives for each row alone."""
    tokenizer = demo_processor().tokenizer
    sizes = Sizes(4, (1, 3), 2, 1, 8, 3, 1, 2, (1,), 4, 28)
    hf_config = sizes.hf_config()
    hf_config.image_token_index = len(tokenizer) - 1
    hf_config.text_config.vocab_size = len(tokenizer) - 1
    hf_config.text_config.bos_token_id = tokenizer.bos_token_id
    hf_config.text_config.eos_token_id = tokenizer.eos_token_id
    hf_config.text_config.pad_token_id = tokenizer.pad_token_id
    reference = random_model(hf_config, 0)
    model = ours(reference, "meta", layout="stacked")

    with under("meta", reference):
        total, count = 0.0, 0
        images_of = MllamaImageProcessorPil(
            size={"height": 28, "width": 28}, max_image_tiles=4, image_mean=CLIP_MEAN, image_std=CLIP_STD
        )
        for pictures, messages in WRITTEN:
            ids, trained = [tokenizer.bos_token_id], [False]
            for role, text in messages:
                whole, header = said(role, text), f"<|start_header_id|>{role}<|end_header_id|>\n\n"
                tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
                start = len(tokenizer(header, add_special_tokens=False)["input_ids"])
                ids += tokens
                trained += [role == "assistant" and i >= start for i in range(len(tokens))]
            inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            if pictures:
                features = dict(images_of([pictures], return_tensors="pt"))
                tiles = features.pop("num_tiles")
                sparse = [get_cross_attention_token_mask(ids, hf_config.image_token_index)]
                dense = convert_sparse_cross_attention_mask_to_dense(sparse, tiles, 4, len(ids))
                inputs |= {**features, "cross_attention_mask": torch.tensor(dense)}
            logits = reference(**inputs, use_cache=False).logits[0, :-1]
            chosen = torch.tensor(trained[1:])
            loss = torch.nn.functional.cross_entropy(
                logits[chosen], inputs["input_ids"][0, 1:][chosen], reduction="sum"
            )
            loss.backward()
            total, count = total + loss.item(), count + int(chosen.sum())
    names = dict(zip(published_names(reference), reference.parameters(), strict=True))
    wanted = {name: p.grad.numpy() / count for name, p in names.items() if p.grad is not None}

    ends = tuple(tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]))
    config = replace(model.config, text=replace(model.config.text, eos_token_ids=ends))
    processor = Processor(config, tokenizer)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loader = Loader(FewRows(), processor, ChatSettings(), LoaderSettings(3), device, shuffle=False, cache=tmp_path)
    (batch,) = loader.batches(0, 1)
    assert batch["pixel_values"].shape[:2] == (3, 3)

    def mean_loss(trained, batch):
        sums = loss_sums(trained, {}, batch, config=model.config, dtype=jnp.float32, remat="none")
        return sums.total.sum() / sums.tokens.sum(), sums.tokens.sum()

    compute = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
    (loss, tokens), gradients = compute(flatten_dict(model.params, sep="."), batch)
    assert int(tokens) == count
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    for name, got in by_tensor(gradients, model.config).items():
        want = wanted.get(name, np.zeros_like(got))
        np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max(), err_msg=name)
    assert np.abs(wanted["vision_model.class_embedding"]).max() > 0
