"""The command that trains, as one run on two real processes: the losses of one device, over 20 steps.

Four processes, and parts of a batch: ``tests/evidence/many_hosts.py`` and ``tests/training/test_state.py``.
"""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from llava_cot_jax import convert
from tests.distributed.train_runs import STEPS, TWO, run_alone, run_on_hosts
from tests.training.small_run import losses, metrics, validation_loss, write_small

APART = 2 * 1e-5**0.5
"""How far two runs that differ by rounding may be apart: rms over a tensor, over what AdamW can move a parameter.

An update is the learning rate times about -1 to 1, so the sum of the learning rates is as far as a parameter can go. Of
a gradient whose elements are off by e of the tensor's rms gradient, those smaller than that, a share of about e, may be
taken for anything, and g of the others turns the update by e / g: the mean square of an update's error is
min(2, e / g)^2 over a density that is 0.4 around zero, some 3e, its rms at most 2 sqrt(e). The largest difference, of
one parameter among thousands, has no such bound: its gradient may have been noise. The losses agree to 1e-5; gradients
as near, whose errors always had the same sign, would come to 2 sqrt(1e-5) of the way. Two runs are 0.34 apart where one
process has no say in the gradients, and 0.02 where the means of its shards count alike, of however many tokens.
"""


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path, cache):
    write_small(tmp_path / "small")
    run_alone(tmp_path, "one", cache, quick=True)
    alone = losses(tmp_path / "one")
    assert alone[-1] < 0.9 * alone[0]
    # Unequal counts of trained tokens: that shards are weighted by them shows.
    assert len({line["trained_tokens"] for line in metrics(tmp_path / "one") if "loss" in line}) > STEPS / 2

    printed, other = run_on_hosts(tmp_path, "two", cache, TWO, quick=True)
    np.testing.assert_allclose(losses(tmp_path / "two"), alone, rtol=1e-5)
    assert validation_loss(tmp_path / "two") == pytest.approx(validation_loss(tmp_path / "one"), rel=1e-5)
    assert "4 x cpu, processes: 2" in printed and "step" not in other  # one of them speaks
    # Both devices of a host lie along ``tensor``: each host reads half, but for norms and biases, which are on all.
    size = (tmp_path / "small/model.safetensors").stat().st_size / 1e9
    read = [float(gigabytes) for gigabytes in re.search(r"GB: (.*)", printed)[1].split(", ")]
    assert len(read) == 2 and max(read) < 0.55 * size and sum(read) > 0.99 * size

    for name in ("one", "two"):
        convert.main([str(tmp_path / name), str(tmp_path / f"{name} exported")])
    ours, theirs = (load_file(tmp_path / f"{name} exported/model.safetensors") for name in ("one", "two"))
    began = load_file(tmp_path / "small/model.safetensors")
    assert ours.keys() == theirs.keys() == began.keys()
    farthest = sum(line["learning_rate"] for line in metrics(tmp_path / "one") if "learning_rate" in line)
    for name, tensor in ours.items():
        assert rms(tensor - began[name]) > APART * farthest, name  # it moved, so that being apart shows
        assert rms(theirs[name] - tensor) < APART * farthest, name


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))
