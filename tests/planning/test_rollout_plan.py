"""The least cost of giving values to candidates, against counts by hand."""

import json
from dataclasses import replace

import pytest

from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.costs.chips import CHIPS
from llava_cot_jax.costs.model_costs import parameters_per_step
from llava_cot_jax.data.shapes.rows import SIZES
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.planning.rollout_plan import estimate_rollouts
from llava_cot_jax.rollout import main
from llava_cot_jax.search.scorers import Judge, Verifier
from llava_cot_jax.search.strategies import BestOfN, StageBeam
from llava_cot_jax.stage_format import StageFormat

CONFIG = MllamaConfig.llama32_11b()

WORK = Workload(
    prompt_tokens=11, image_tiles=0, stage_tokens=(5, 3), reason_tokens=7, judge_prompt_tokens=20, probe_tokens=6
)


def test_tokens_and_bytes_by_hand():
    """Two candidates of 5 tokens with three continuations each, then three of 3, judged in both orders with reasons."""
    format = StageFormat.tagged(("REASONING", "CONCLUSION"))
    spec = StageBeam((2, 3), Judge("rationale"), 1.0, (5, 3), format=format).to_spec()
    memory_bound = replace(CHIPS[0], peak_flops=1e30)
    first, second = [
        estimate_rollouts(CONFIG, spec, 3, memory_bound, questions=1, slots=1, work=WORK, weight_bytes=size)
        for size in (1, 2)
    ]
    queries = 1 * 2 + 2 * 2
    assert first.sampled == (2 * 5 + 3 * 3) + 2 * 3 * 3 + queries * 7
    joints, winner, probes = 2 * 8, 5 + 8, (2 + 3) * (6 + 1 + 6)
    assert first.read == 11 + joints + winner + probes + 2 * (2 * 5 + 20) + 4 * (2 * 3 + 20)
    # Prompt; of the first stage probes, queries, joints, winner and probes; of the second probes, queries and probes.
    calls = 1 + 5 + 3
    steps = (5 - 1) + (3 - 1) + (3 - 1) + 2 * (7 - 1)
    seconds = (calls + steps) * parameters_per_step(CONFIG, images=False) / memory_bound.hbm_bandwidth
    assert (second.chip_hours - first.chip_hours) * 3600 == pytest.approx(seconds)


def test_whole_answers_by_hand():
    """Three answers of 8 tokens: the prompt, their tokens but for the first of each, and a probe of each."""
    spec = BestOfN(3, Verifier(), 1.0, 8).to_spec()
    work = replace(WORK, stage_tokens=(8,))
    found = estimate_rollouts(CONFIG, spec, 0, CHIPS[0], questions=2, slots=1, work=work)
    assert (found.sampled, found.read) == (2 * 3 * 8, 2 * (11 + 3 * 6))


def test_stages_are_no_longer_than_they_may_be(capsys, tmp_path, monkeypatch):
    """Two stages have 195 tokens each by default, and no more than --max_new_tokens."""
    stages = [{"name": name, "opening": f"<{name}>", "closing": f"</{name}>"} for name in ("REASONING", "CONCLUSION")]
    (tmp_path / "two.yaml").write_text(json.dumps({"stages": stages}))
    monkeypatch.setitem(SIZES, "train", 100)  # each row is counted
    main(["--data", "shapes", "--estimate", "--format", str(tmp_path / "two.yaml"), "--max_new_tokens", "[300,8]"])
    assert "stages of 195, 8 tokens" in capsys.readouterr().out
