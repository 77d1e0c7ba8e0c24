"""The benchmark: its lengths, its report, and its refusals."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache

from llava_cot_jax import bench, cli
from llava_cot_jax.benchmark import report
from llava_cot_jax.benchmark import workload as workloads
from llava_cot_jax.benchmark.baseline import TransformersBaseline
from llava_cot_jax.benchmark.inputs import endless_tables
from llava_cot_jax.benchmark.search_benchmark import BenchmarkRow, SearchBenchmark
from llava_cot_jax.benchmark.timing import DeviceRates
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.costs import model_costs
from llava_cot_jax.search.program import search
from llava_cot_jax.search.scorers import Judge
from llava_cot_jax.search.strategies import StageBeam
from tests.parity.reference import shortfall
from tests.parity.test_transformers import OFF
from tests.processes import ROOT
from tests.search.models import random_model

WORK = Workload(
    prompt_tokens=9,
    image_tiles=1,
    stage_tokens=(3, 4, 5, 2),
    reason_tokens=3,
    check_tokens=2,
    judge_prompt_tokens=8,
    num_candidates=(1, 2),
)


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    code = 0
    try:
        cli.run(bench.main)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_standard_workload_is_the_default():
    parser = bench._parser()
    given = ["--workload", str(ROOT / "configs" / "bench_standard.yaml")]
    assert parser.instantiate(parser.parse_args(given)).workload == Workload()


def test_a_length_alone_is_changed():
    parser = bench._parser()
    given = ["--workload.image_tiles", "1", "--workload.stage_tokens", "[3, 4]"]
    assert parser.instantiate(parser.parse_args(given)).workload == Workload(image_tiles=1, stage_tokens=(3, 4))


def test_the_model_of_100_million_parameters():
    config = workloads.config_100m()
    assert 90e6 < sum(model_costs.parameter_counts(config).values()) < 105e6
    assert (config.text.vocab_size, config.vision.image_tokens) == (128256, 6404)


@pytest.mark.slow
def test_all_lengths_are_forced():
    """Every candidate and every reason is as long as it may be."""
    model, _ = random_model(0, eos=tuple(range(0, 500, 3)))  # would end soon
    timed = SearchBenchmark(model, WORK, runs=1)
    judge = Judge("rationale", both_orders=False, reason_tokens=3, check_tokens=2)
    spec = StageBeam(2, judge, max_new_tokens=WORK.stage_tokens).to_spec()
    stage_tables, scorer_tables = endless_tables(timed.config, WORK, spec)
    found = bench_search(timed, spec, stage_tables, scorer_tables)
    lengths = np.asarray(found.candidates.lengths)[:, 0]  # [stages, candidates]
    np.testing.assert_array_equal(lengths, np.repeat(np.array(WORK.stage_tokens)[:, None], 2, axis=1))
    reasons = np.asarray(found.judgement.queries.reason.lengths)[:, 0]
    asked = np.asarray(found.judgement.num_queries)[:, 0]
    assert asked.tolist() == [1, 1, 3, 1]
    assert [row[:n].tolist() for row, n in zip(reasons, asked, strict=True)] == [[3], [3], [2, 2, 3], [3]]


def bench_search(timed, spec, stage_tables, scorer_tables):
    static = {"config": timed.config, "spec": spec, "prefill_chunk": 64, "mesh": None}
    return search(timed.params, timed.search_inputs, stage_tables, scorer_tables, **static)


@pytest.fixture
def found_again() -> Iterator[list[str]]:
    """List what is found in the compilation cache, which the command begins anew in a folder of its own."""
    found: list[str] = []
    jax.monitoring.register_event_listener(
        lambda event, **_: found.append(event) if event == "/jax/compilation_cache/cache_hits" else None
    )
    shared = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    yield found
    jax.config.update("jax_compilation_cache_dir", shared)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_the_report(monkeypatch, capsys, tmp_path, found_again):
    """JSON objects go to stdout, one a line, and the tables, with transformers, to stderr."""
    work = tmp_path / "work.yaml"
    lengths = {**asdict(WORK), "stage_tokens": list(WORK.stage_tokens), "num_candidates": list(WORK.num_candidates)}
    work.write_text(yaml.safe_dump(lengths))
    monkeypatch.setitem(workloads.RANDOM_MODELS, "100m", lambda: random_model(0, convention="transformers_5")[0].config)
    given = ["--random", "100m", "--dtype", "float32", "--workload", str(work), "--runs", "2", "--json"]
    code, out, err = run(monkeypatch, capsys, *given, "--baseline", "transformers")
    assert code == 0, err
    parts = [json.loads(line) for line in out.splitlines()]
    rows, baseline = ([part[name] for part in parts if name in part] for name in ("row", "baseline"))
    totals = {name: value for part in parts for name, value in part.items()}
    assert list(parts[0]) == ["date", "versions", "device", "workload", "rates"]
    names = [row["name"] for row in rows]
    components = ["vision tower", "prefill", "decode, N = 1", "decode, N = 2", "verifier, N = 2", "judge, a pair"]
    assert names[: len(components)] == components
    assert [row["sequences"] for row in rows[2:4]] == [1, 2]
    assert len(found_again) >= len(names)  # each was timed warm too
    assert "stage beam, rationale, N = 2" in names and "greedy" in names
    assert all(p["timing"]["median"] > 0 and p["flops"] > 0 for p in rows)
    assert totals["recompilations"] == 0
    assert set(totals["scorer_share"]) == {"verifier, N = 2", "token, N = 2", "rationale, N = 2"}
    calls = {row["method"]: row["calls"] for row in baseline}
    assert calls == {"one call after another": 10 * 2 - 6, "batched sampling, no judge": 4}
    assert "differ from transformers' by at most" in err and "times as long as ours" in err


@pytest.mark.slow
def test_a_report_that_is_cut_off_has_what_was_measured(monkeypatch, capsys, all_devices, found_again):
    """The second measurement on all devices is interrupted."""
    component_rows, measured = SearchBenchmark.component_rows, []

    def interrupted(self: SearchBenchmark) -> Iterator[BenchmarkRow]:
        assert self.model.mesh.size == jax.device_count() == 8
        measured.append(next(component_rows(self)))
        yield measured[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(SearchBenchmark, "component_rows", interrupted)
    monkeypatch.setattr(report, "device_rates", lambda _: [DeviceRates("measured", 1.0, 1.0)])
    monkeypatch.setitem(workloads.RANDOM_MODELS, "100m", lambda: random_model(0)[0].config)
    given = ["--random", "100m", "--runs", "2", "--json", "--workload.image_tiles", "1"]
    code, out, _ = run(monkeypatch, capsys, *given)
    about, told = map(json.loads, out.splitlines())
    assert code == 130 and about["workload"]["prompt_tokens"] == 128
    assert told == {"row": asdict(measured[0])}
    assert measured[0].name == "vision tower" and measured[0].timing.recompilations == 0 < measured[0].timing.median
    assert found_again  # it was timed warm too


@pytest.mark.slow
def test_logits_are_those_of_transformers():
    """The baseline has the same weights and the same question."""
    model, _ = random_model(0, convention="transformers_5")
    off, largest = TransformersBaseline(
        model, WORK, SearchBenchmark(model, WORK, runs=1).search_inputs
    ).logit_difference()
    assert off < OFF * largest


def test_the_baseline_reads_what_it_has_read_from_its_cache():
    """There is one run of the vision tower and one token per step, and the tokens are those without a cache."""
    model, _ = random_model(0, convention="transformers_5")
    baseline = TransformersBaseline(model, WORK, SearchBenchmark(model, WORK, runs=1).search_inputs)
    theirs, inputs = baseline._model, baseline._tensors(baseline._prompt, image=True)
    runs, read = [], []
    theirs.model.vision_model.register_forward_pre_hook(lambda *_: runs.append(1))
    theirs.model.language_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    out = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, num_return_sequences=1, eos_token_id=-1)
    assert (len(runs), read) == (1, [(1, WORK.prompt_tokens), *[(1, 1)] * 7])
    batch = {name: x.numpy() for name, x in inputs.items()}
    assert shortfall(theirs, batch, out[:, WORK.prompt_tokens :].numpy()).max() < 2 * OFF


def test_a_roofline_is_the_larger_of_two():
    device_rates = DeviceRates("measured", flops=100.0, bytes=10.0)
    assert (device_rates.roofline_seconds(1000, 10), device_rates.roofline_seconds(10, 1000)) == (10, 100)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "either --checkpoint or --random"),
        (["--random", "100m", "--checkpoint", "x"], "either --checkpoint or --random"),
        (["--random", "7b"], "random"),
        (["--checkpoint", "none/at/all"], "none/at/all"),
        (["--random", "100m", "--runs", "0"], "runs is 0; it must be at least 1"),
        (["--random", "100m", "--workload", "none.yaml"], "none.yaml"),
        (["--random", "100m", "--baseline", "vllm"], "baseline"),
        (["--random", "100m", "--quantize", "int8", "--baseline", "transformers"], "without --quantize"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(monkeypatch, capsys, arguments, named):
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert named in err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prompt_token: 3", "did you mean workload.prompt_tokens?"),
        ("prompt_tokens: 0", "workload.prompt_tokens is 0; it must be at least 1"),
        ("prompt_tokens: [3]", "prompt_tokens"),
        ("stage_tokens: 3", "stage_tokens"),
        ("stage_tokens: []", "stage_tokens must be a list of at least one"),
        ("stage_tokens: [1, 0]", "it must be at least 1"),
        ("image_tiles: -1", "workload.image_tiles is -1; it must be at least 0"),
        ("judge_prompt_tokens: 2", "workload.judge_prompt_tokens is 2; it must be at least 5"),
        ("3", "work.yaml"),
    ],
)
def test_a_workload_that_cannot_be_used(monkeypatch, capsys, tmp_path, text, named):
    (tmp_path / "work.yaml").write_text(text)
    code, _, err = run(monkeypatch, capsys, "--random", "100m", "--workload", str(tmp_path / "work.yaml"))
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err, err
