"""The command ``plan``: its figures, its refusals, and the TPU compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.plan import main
from llava_cot_jax.planning import present
from llava_cot_jax.planning.compiler import CompiledProgram

ROOT = Path(__file__).parents[1]
FULL = ["--config", str(ROOT / "configs/llava_cot_11b_v5e_64.yaml"), "--compile", "false"]
BEAM = ["--config", str(ROOT / "configs/generate_stage_beam.yaml"), "--compile", "false"]


def told(capsys, *arguments: str) -> list[dict]:
    main([*arguments, "--json"])
    out, found = capsys.readouterr().out, []
    decoder = json.JSONDecoder()
    while out := out.strip():
        value, end = decoder.raw_decode(out)
        found.append(value)
        out = out[end:]
    return found


def test_a_training_run(capsys):
    (plan,) = told(capsys, *FULL, "--topology", "v5e:8x8")
    assert plan["chips"] == 64 and plan["mesh"] == {"data": 1, "fsdp": 32, "tensor": 2}
    assert plan["compiled"] is None
    sizes = plan["computed"]["memory"]
    assert 1e9 < sizes["optimizer"] == pytest.approx(2 * sizes["parameters"], rel=1e-6)
    assert sum(sizes.values()) < plan["usable_hbm_bytes"]
    assert 0 < plan["hours"] < 10


def test_the_same_slice_by_its_accelerator_type_and_twice_the_mfu(capsys):
    (by_shape,) = told(capsys, *FULL, "--topology", "v5e:8x8", "--mfu", "0.2")
    (by_type,) = told(capsys, *FULL, "--topology", "v5e-64", "--mfu", "0.4")
    assert by_type["slice"] == by_shape["slice"] and by_type["hours"] == pytest.approx(by_shape["hours"] / 2)


def test_the_size_of_the_data_set_changes_the_hours(capsys):
    (base,) = told(capsys, *FULL, "--topology", "v5e:8x8")
    (fewer,) = told(capsys, *FULL, "--topology", "v5e:8x8", "--examples", "49223")
    (longer,) = told(capsys, *FULL, "--topology", "v5e:8x8", "--tokens_per_example", "1200")
    (album,) = told(capsys, *FULL, "--topology", "v5e:8x8", "--images_per_example", "3")
    assert fewer["hours"] == pytest.approx(base["hours"] / 2, rel=0.01) and longer["hours"] > base["hours"]
    assert album["hours"] > base["hours"]
    one, three = (plan["computed"]["memory"]["batch"] for plan in (base, album))  # nearly all of it is pixels
    assert 2.9 * one < three < 3.1 * one


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_told_what_would(capsys):
    main([*FULL, "--topology", "v5e-8", "--mesh.fsdp", "null", "--mesh.tensor", "1"])
    out = capsys.readouterr().out
    assert "no: " in out and "GB too much" in out
    options = "--optimizer.precision bfloat16_stochastic --loader.batch_size 8"
    assert f"would fit, computed: {options}" in " ".join(out.split())
    assert "(v5e-8, 8 chips): computed, not measured" in out


@pytest.mark.slow
def test_auto_recommends_a_slice_and_its_mesh(capsys):
    main([*FULL, "--topology", "auto"])
    out = capsys.readouterr().out
    assert out.count("training on") == 3
    assert "recommended: v5p:2x2x1 (v5p-8), --mesh.data 1 --mesh.fsdp 4 --mesh.tensor 1" in out


def test_any_mesh_is_the_one_with_the_shortest_step(capsys):
    (chosen,) = told(capsys, *FULL, "--topology", "v5e-64", "--any_mesh", "true")
    (given,) = told(capsys, *FULL, "--topology", "v5e-64")
    steps = [max(plan["computed"]["roofline"]["seconds"].values()) for plan in (chosen, given)]
    assert steps[0] <= steps[1]


def test_a_search(capsys):
    (plan,) = told(capsys, *BEAM, "--topology", "v6e-1", "--num_candidates", "10")
    assert plan["chips"] == 1
    assert sum(plan["computed"]["memory"].values()) / 1e9 == pytest.approx(24.3, rel=0.1)  # what was compiled
    (int8,) = told(capsys, *BEAM, "--topology", "v6e-1", "--num_candidates", "10", "--quantize", "int8")
    assert int8["computed"]["seconds"] < plan["computed"]["seconds"]
    main([*BEAM, "--topology", "v6e-1", "--num_candidates", "10"])
    assert "at most 5" in " ".join(capsys.readouterr().out.split())


def test_a_training_run_needs_no_output(capsys, tmp_path):
    lines = Path(FULL[1]).read_text().splitlines(keepends=True)
    without = tmp_path / "run.yaml"
    without.write_text("".join(line for line in lines if not line.startswith("output:")))
    planned = [
        told(capsys, "--config", str(configuration), "--compile", "false", "--topology", "v5e-64")
        for configuration in (FULL[1], without)
    ]
    assert planned[0] == planned[1]


def test_options_of_generate_that_only_show_or_ask_are_ignored(capsys):
    configuration = str(ROOT / "configs/shapes_search.yaml")  # it draws pictures, and writes a page
    (plan,) = told(capsys, "--config", configuration, "--compile", "false", "--topology", "v6e-1")
    assert plan["computed"]["seconds"] > 0


@pytest.mark.slow
def test_auto_for_a_search_of_the_90b(capsys):
    main([*BEAM, "--topology", "auto", "--checkpoint", "meta-llama/Llama-3.2-90B-Vision-Instruct"])
    assert "recommended: " in capsys.readouterr().out


MISTAKES = [
    ([*FULL, "--topology", "v5e-8"], "is not v5e:2x4's 8 chips: set mesh.fsdp to null"),
    ([*FULL, "--topology", "v5e:3x3"], "no slice that is offered; slices of v5e: v5e:1x1"),
    ([*FULL, "--topology", "v9-8"], "is no slice: write it as v5e:4x8"),
    ([*FULL, "--topology", "v5e-64", "--mfu", "40"], "mfu is 40.0; it must be above 0"),
    ([*FULL, "--topology", "v5e-64", "--examples", "0"], "must be at least 1"),
    ([*FULL, "--topology", "v5e-64", "--checkpoint", "nowhere/model"], "nowhere/model is no folder"),
    ([*FULL, "--topology", "v5e-64", "--optimiser.b1", "0.9"], "did you mean"),
    ([*BEAM, "--topology", "2*v5e:2x2"], "runs on one slice"),
    ([*BEAM, "--topology", "v5e-4", "--questions", "0"], "questions is 0"),
    ([*BEAM, "--topology", "v5e-4", "--checkpoint", "nowhere"], "nowhere is no folder"),
    ([*BEAM, "--topology", "v5e-4", "--num_candidates", "0"], "num_candidates is 0; it must be at least 1"),
    (["--config", "missing.yaml", "--topology", "v5e-4"], "missing.yaml"),
    (FULL, "topology"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_line_before_anything_is_compiled(arguments, message):
    with pytest.raises(UserError) as refused:
        main(arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize("content", ["topology: [", "search: nonsense", "- 1"])
def test_a_configuration_that_is_none_is_a_mistake_too(tmp_path, content):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UserError):
        main(["--config", str(tmp_path / "run.yaml"), "--topology", "v5e-4"])


@pytest.mark.parametrize(("collectives", "sent"), [(None, None), ((), {})], ids=["not readable", "none"])
def test_a_program_that_sends_nothing_differs_from_one_that_cannot_be_read(capsys, monkeypatch, collectives, sent):
    monkeypatch.setattr(present, "compile_training", lambda *_: CompiledProgram(collectives=collectives))
    (told_,) = told(capsys, *FULL, "--topology", "v5e-64", "--compile", "true")
    assert told_["compiled"]["sent_bytes"] == sent


@pytest.mark.slow
def test_a_compiled_program_is_cached(tmp_path, cache):
    """Compile a step of the shapes world for two slices, with the real compiler, in two processes."""
    (tmp_path / "llava_cot_jax").mkdir()
    (cache / "llava_cot_jax/index").mkdir(parents=True, exist_ok=True)
    (tmp_path / "llava_cot_jax/index").symlink_to(cache / "llava_cot_jax/index")  # the rows are counted once
    arguments = [
        "--output",
        "o",
        "--checkpoint",
        "shapes",
        "--data",
        "shapes",
        "--topology",
        "2*v5e-1",
        "--steps",
        "10",
    ]
    arguments += ["--mesh.data", "2", "--mesh.fsdp", "1"]
    sizes = ["--loader.batch_size", "4", "--chat.max_length", "128", "--remat", "none", "--json"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": ""}  # it takes no CPU's flags
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "llava_cot_jax.plan", *arguments, *sizes],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=tmp_path,
        )
        runs.append((json.loads(done.stdout), "compiling the training step" in done.stderr))
    (first, waited), (second, waited_again) = runs
    assert waited and not waited_again and first == second
    assert first["compiled"]["error"] is None and first["compiled"]["arguments"] > 0
    assert first["usable_hbm_bytes"] > first["compiled"]["temporaries"] > 0
    # Only gradients go between the slices. Small ones are padded to a tile of 8 x 128 values.
    predicted = first["computed"]["roofline"]["sent_bytes"]["data"]
    assert predicted < first["compiled"]["sent_bytes"]["data"] < 1.15 * predicted
