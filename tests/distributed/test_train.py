"""The command that trains, as one run on two real processes: the losses of one device, over 20 steps.

Four processes, and parts of a batch: ``tests/evidence/many_hosts.py`` and ``tests/training/test_state.py``.
"""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed.train_runs import STEPS, TWO, run_alone, run_on_hosts
from tests.training.small_run import command, losses, metrics, validation_loss, write_small


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path, cache):
    write_small(tmp_path / "small")
    run_alone(tmp_path, "one", cache)
    alone = losses(tmp_path / "one")
    assert alone[-1] < 0.9 * alone[0]
    # Unequal counts of trained tokens: that shards are weighted by them shows.
    assert len({line["trained_tokens"] for line in metrics(tmp_path / "one") if "loss" in line}) > STEPS / 2

    printed, other = run_on_hosts(tmp_path, "two", cache, TWO)
    np.testing.assert_allclose(losses(tmp_path / "two"), alone, rtol=1e-5)
    assert validation_loss(tmp_path / "two") == pytest.approx(validation_loss(tmp_path / "one"), rel=1e-5)
    assert "4 x cpu, processes: 2" in printed and "step" not in other  # one of them speaks
    # Both devices of a host lie along ``tensor``: each host reads half, but for norms and biases, which are on all.
    size = (tmp_path / "small/model.safetensors").stat().st_size / 1e9
    read = [float(gigabytes) for gigabytes in re.search(r"GB: (.*)", printed)[1].split(", ")]
    assert len(read) == 2 and max(read) < 0.55 * size and sum(read) > 0.99 * size

    for name in ("one", "two"):
        done = command("convert", str(tmp_path / name), str(tmp_path / f"{name} exported"), cache=cache)
        assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(tmp_path / f"{name} exported/model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(theirs[name], tensor, atol=2e-4, err_msg=name)
