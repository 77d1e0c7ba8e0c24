"""The model against the reference outputs of the tiny checkpoint, and against itself in other forms."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama, hidden_states
from llava_cot_jax.model.parameters import parameters
from tests.conftest import INPUTS
from tests.tiers import in_tiers

CONVENTIONS = ("meta", "transformers_4", "transformers_5")


def off(got, want) -> float:
    """The largest difference over the largest magnitude."""
    return float(np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(np.asarray(want)).max())


@pytest.mark.parametrize("convention", in_tiers(CONVENTIONS, suite=["meta", "transformers_5"]))
def test_fixture(tiny, reference, batch, convention):
    model = Mllama.from_pretrained(tiny, convention=convention)
    assert off(model(**batch), reference[f"{convention}_logits"]) < 1e-4
    images = {name: batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    features = model.vision_features(**images)
    assert off(features, reference[f"{convention}_vision"]) < 1e-4
    prompt = batch["input_ids"].shape[1]
    generated = reference[f"{convention}_generated"]
    want, last = generated[:, prompt:], batch["cross_attention_mask"][:, -1:]
    sees = np.concatenate([batch["cross_attention_mask"], np.repeat(last, want.shape[1], axis=1)], axis=1)
    whole = batch | {"input_ids": generated, "attention_mask": np.ones_like(generated), "cross_attention_mask": sees}
    np.testing.assert_array_equal(np.asarray(model(**whole))[:, prompt - 1 : -1].argmax(axis=-1), want)
    # A generator answers each row as alone. That differs from transformers' batch where images fill up a row's place.
    rows = (batch["aspect_ratio_ids"] > 0).all(axis=1) | (convention == "meta")
    # The reference went on past the end of its answers.
    model.config = replace(model.config, text=replace(model.config.text, eos_token_ids=()))
    np.testing.assert_array_equal(Generator(model).generate(batch, max_new_tokens=want.shape[1])[rows], want[rows])


@pytest.mark.slow
def test_the_conventions_differ(tiny, batch):
    meta, four, five = (np.asarray(Mllama.from_pretrained(tiny, convention=c)(**batch)) for c in CONVENTIONS)
    assert min(off(meta, four), off(meta, five), off(four, five)) > 1e-2


def loss_and_gradients(model: Mllama, batch) -> tuple[float, dict[str, np.ndarray]]:
    loss, gradients = nnx.value_and_grad(lambda model: jnp.square(model(**batch)).mean())(model)
    return float(loss), flatten_dict(nnx.to_pure_dict(gradients), sep=".")


@pytest.fixture(scope="module")
def unrolled_gradients(tiny, reference):
    return loss_and_gradients(Mllama.from_pretrained(tiny), {name: reference[name] for name in INPUTS})


@pytest.mark.parametrize("remat", in_tiers(["none", "dots", "full"], suite=["full"]))
def test_stacked_layers_give_the_same_loss_and_gradients(tiny, batch, unrolled_gradients, remat):
    want, by_layer = unrolled_gradients
    model = Mllama.from_pretrained(tiny, layout="stacked", remat=remat)
    got, by_stack = loss_and_gradients(model, batch)
    assert abs(got - want) < 1e-5 * want
    for path, parameter in parameters(model.config, "stacked").items():
        parts = by_stack[path] if parameter.stacked else by_stack[path][None]
        for tensor, part in zip(parameter.tensors, parts, strict=True):
            scale = max(float(jnp.abs(by_layer[tensor]).max()), 1e-6)
            assert float(jnp.abs(part - by_layer[tensor]).max()) < 1e-3 * scale, tensor


@pytest.mark.slow
def test_remat_keeps_less_for_the_backward_pass(tiny, batch):
    kept = []
    for remat in ("none", "dots", "full"):
        model = Mllama.from_pretrained(tiny, layout="stacked")
        inputs = jax.tree.map(jnp.asarray, batch)
        forward = functools.partial(hidden_states, config=model.config, inputs=inputs, remat=remat)
        _, backward = jax.eval_shape(lambda params, forward=forward: jax.vjp(forward, params), model.params)
        kept.append(sum(x.size for x in jax.tree.leaves(backward)))
    assert kept[0] > kept[1] > kept[2] > 0


@pytest.mark.slow
def test_changing_the_layout_and_back_changes_no_bit(tiny):
    model = Mllama.from_pretrained(tiny)
    before = {path: np.asarray(x) for path, x in flatten_dict(model.params, sep=".").items()}
    model.to_layout("stacked")
    stacked = flatten_dict(model.params, sep=".")
    assert {path: x.shape for path, x in stacked.items()} == {
        path: p.shape for path, p in parameters(model.config, "stacked").items()
    }
    want = Mllama.from_pretrained(tiny, layout="stacked")
    for path, x in flatten_dict(want.params, sep=".").items():
        np.testing.assert_array_equal(stacked[path], x)
    model.to_layout("unrolled")
    for path, x in flatten_dict(model.params, sep=".").items():
        np.testing.assert_array_equal(x, before[path])


@pytest.mark.slow
def test_changing_the_layout_holds_one_copy(tiny):
    """Each source array is given up before the next parameter is made."""
    model = Mllama.from_pretrained(tiny)
    size = sum(x.nbytes for x in flatten_dict(model.params, sep=".").values())
    largest = max(math.prod(p.shape) * 4 for p in parameters(model.config, "stacked").values())
    peaks, original = [], jax.block_until_ready

    def watched(x):
        alive = {id(a): a.nbytes for a in jax.live_arrays() if a.dtype == jnp.float32 and not a.is_deleted()}
        peaks.append(sum(alive.values()))
        return original(x)

    others = sum(a.nbytes for a in jax.live_arrays() if a.dtype == jnp.float32) - size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "block_until_ready", watched)
        model.to_layout("stacked")
        model.to_layout("unrolled")
    assert len(peaks) > 20
    assert max(peaks) - others <= size + 2 * largest


@pytest.mark.slow
def test_fresh_weights_are_the_same_in_either_layout(small):
    config = small
    unrolled = Mllama(config, rngs=nnx.Rngs(3))
    stacked = Mllama(config, rngs=nnx.Rngs(3), layout="stacked")
    stacked.to_layout("unrolled")
    for (path, a), b in zip(
        flatten_dict(unrolled.params, sep=".").items(), flatten_dict(stacked.params, sep=".").values(), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=path)
    spread = np.asarray(unrolled.language_model.lm_head.weight[...])
    assert abs(spread.std() - config.text.initializer_range) < 1e-3
    another = Mllama(config, rngs=nnx.Rngs(4)).language_model.lm_head.weight[...]
    assert not np.array_equal(spread, another)


@pytest.mark.parametrize(
    ("config", "tensors", "count", "shapes"),
    [
        (
            MllamaConfig.llama32_11b(),
            906,
            10_670_220_835,
            {
                "language_model.model.layers.3.cross_attn.k_proj.weight": (1024, 4096),
                "language_model.model.layers.39.mlp.down_proj.weight": (4096, 14336),
                "multi_modal_projector.weight": (4096, 7680),
                "language_model.lm_head.weight": (128256, 4096),
            },
        ),
        (
            MllamaConfig.llama32_90b(),
            1494,
            88_593_355_323,
            {
                "language_model.model.layers.98.cross_attn.q_norm.weight": (128,),
                "language_model.model.layers.99.self_attn.q_proj.weight": (8192, 8192),
                "language_model.model.embed_tokens.weight": (128264, 8192),
            },
        ),
    ],
    ids=["11b", "90b"],
)
def test_the_published_trees_without_allocating_them(config, tensors, count, shapes):
    model = nnx.eval_shape(lambda: Mllama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    tree = flatten_dict(nnx.state(model).to_pure_dict(), sep=".")
    assert len(tree) == tensors
    assert sum(x.size for x in tree.values()) == count
    common = {
        "vision_model.patch_embedding.weight": (1280, 3, 14, 14),
        "vision_model.gated_positional_embedding.tile_embedding.weight": (9, 8197120),
        "vision_model.pre_tile_positional_embedding.embedding.weight": (9, 5120),
        "vision_model.transformer.layers.31.mlp.fc1.weight": (5120, 1280),
        "vision_model.global_transformer.layers.7.gate_ffn": (1,),
    }
    for name, shape in (shapes | common).items():
        assert tree[name].shape == shape, name
    stacked = nnx.eval_shape(lambda: Mllama(config, rngs=nnx.Rngs(0), layout="stacked"))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(stacked))) == count


def test_the_tiny_tree_is_that_of_transformers(tiny):
    with safe_open(tiny / "model.safetensors", "numpy") as file:
        published = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    model = Mllama.from_pretrained(tiny)
    assert {path: x.shape for path, x in flatten_dict(model.params, sep=".").items()} == published


@pytest.mark.slow
def test_a_text_only_row_of_a_mixed_batch_is_a_text_only_call(tiny, batch):
    model = Mllama.from_pretrained(tiny, convention="meta")
    alone = model(batch["input_ids"][1:2], attention_mask=batch["attention_mask"][1:2])
    assert off(model(**batch)[1:2], alone) < 1e-5
    other = Mllama.from_pretrained(tiny, convention="transformers_4")
    assert off(other(**batch)[1:2], alone) > 1e-2


@pytest.mark.slow
def test_uint8_tiles_are_normalised_on_the_device(tiny, batch):
    model = Mllama.from_pretrained(tiny)
    vision = model.config.vision
    mean, std = (np.array(s)[:, None, None] for s in (vision.image_mean, vision.image_std))
    raw = np.random.default_rng(0).integers(0, 256, batch["pixel_values"].shape, dtype=np.uint8)
    used = np.zeros(raw.shape[:3], bool)
    for row, ids in enumerate(batch["aspect_ratio_ids"]):
        for image, i in enumerate(ids):
            used[row, image, : np.prod(vision.supported_aspect_ratios[i - 1]) if i else 0] = True
    normal = np.where(used[..., None, None, None], (raw / 255 - mean) / std, 0).astype(np.float32)
    got = model(**{**batch, "pixel_values": raw})
    assert off(got, model(**{**batch, "pixel_values": normal})) < 1e-5


@pytest.mark.slow
def test_the_aspect_ratio_mask_follows_from_the_ids(tiny, batch):
    """One operation after another, not compiled: XLA may round two programs differently."""
    model = Mllama.from_pretrained(tiny)
    inputs = {name: jnp.asarray(x) for name, x in batch.items()}
    with jax.disable_jit():
        want = hidden_states(model.params, model.config, inputs)
        del inputs["aspect_ratio_mask"]
        np.testing.assert_array_equal(hidden_states(model.params, model.config, inputs), want)


@pytest.mark.slow
def test_jax_arrays_and_jit(tiny, batch):
    model = Mllama.from_pretrained(tiny)
    want = model(**batch)
    on_device = {name: jnp.asarray(x) for name, x in batch.items()}
    np.testing.assert_array_equal(model(**on_device), want)
    jitted = nnx.jit(lambda model, batch: model(**batch))
    assert off(jitted(model, on_device), want) < 1e-5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cross_attention_mask": None}, "cross_attention_mask"),
        ({"aspect_ratio_ids": None}, "aspect_ratio_ids"),
        ({"pixel_values": np.zeros((3, 2, 4, 3, 42, 42), np.uint8)}, "pixel_values"),
        ({"pixel_values": np.zeros((3,), np.uint8)}, "pixel_values"),
        ({"attention_mask": np.ones((3, 11))}, "attention_mask"),
        ({"cross_attention_mask": np.ones((3, 10, 1, 4))}, "cross_attention_mask"),
        ({"input_ids": np.zeros(10, np.int32)}, "input_ids"),
        ({"input_ids": np.zeros((3, 513), np.int32)}, "context of 512"),
    ],
)
def test_arrays_that_do_not_belong_together(tiny, batch, change, named):
    model = Mllama.from_pretrained(tiny)
    with pytest.raises(UserError, match=named):
        model(**{**batch, **change})


def test_decoding_needs_the_unrolled_layout(tiny):
    with pytest.raises(UserError, match="to_layout"):
        Generator(Mllama.from_pretrained(tiny, layout="stacked"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_in_float16_the_tower_does_not_overflow(tiny, batch):
    """Its states exceed the range of float16, as those of the published tower do; what it gives the text does not."""
    model = Mllama.from_pretrained(tiny)
    arrays = {name: np.asarray(x) for name, x in flatten_dict(model.params, sep=".").items()}
    arrays["vision_model.transformer.layers.0.mlp.fc2.bias"] = np.full(32, 3e4, np.float32)
    for i in (1, 2):
        arrays[f"vision_model.transformer.layers.{i}.mlp.fc2.bias"] = np.linspace(2e4, 4e4, 32, dtype=np.float32)
    arrays["multi_modal_projector.weight"] = arrays["multi_modal_projector.weight"] / 1024
    images = {name: batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    logits, features = [], []
    for dtype in ("float32", "float16"):
        cast = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
        model = Mllama.from_arrays(model.config, cast, layout="unrolled")
        features.append(model.vision_features(**images))
        logits.append(np.asarray(model(**batch)))
    assert np.abs(features[0]).max() > 1.5 * float(np.finfo(np.float16).max)
    assert features[1].dtype == jnp.float32 and off(features[1], features[0]) < 2e-3
    assert off(logits[1], logits[0]) < 2e-2


@pytest.fixture(scope="module")
def tiny_model(tiny) -> Mllama:
    return Mllama.from_pretrained(tiny)


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray], ids=["host", "device"])
@pytest.mark.parametrize(
    ("name", "wrong", "rows"),
    [("input_ids", -1, 264), ("input_ids", 264, 264), ("aspect_ratio_ids", 9, 9), ("aspect_ratio_ids", -1, 9)],
)
def test_an_id_beyond_its_table_is_refused(tiny_model, batch, place, name, wrong, rows):
    """By a call, by the tower alone and by a generator."""
    batch[name][1, 0] = wrong
    given = {each: place(x) for each, x in batch.items()}
    calls = [lambda: tiny_model(**given), lambda: Generator(tiny_model).generate(given, max_new_tokens=2)]
    if name == "aspect_ratio_ids":
        images = {each: given[each] for each in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        calls.append(lambda: tiny_model.vision_features(**images))
    for call in calls:
        with pytest.raises(UserError, match=f"^{name} has {wrong}, but this model has the ids 0 to {rows - 1}$"):
            call()


def test_ids_that_wrap_to_32_bits_or_are_no_integers(tiny_model):
    with pytest.raises(UserError, match="input_ids has 4294967297"):
        tiny_model(np.array([[2**32 + 1]]))
    with pytest.raises(UserError, match="input_ids is an array of float32; ids are whole numbers"):
        tiny_model(np.array([[1.0]], np.float32))


@pytest.mark.slow
def test_ids_that_are_traced_are_not_looked_at(tiny_model):
    """Every id of the embedding is one, that of the image token and of the rows after it too."""
    ids = np.array([[250, 1, 263]])
    np.testing.assert_allclose(jax.jit(lambda x: tiny_model(x))(ids), tiny_model(ids), atol=1e-5)
