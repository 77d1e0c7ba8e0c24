"""Devices that a process keeps to: variables of libtpu and settings of jax, where there is neither TPU nor GPU."""

import os
from pathlib import Path

import jax
import pytest
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES

from llava_cot_jax import tpu_chips
from llava_cot_jax.hosts.joining import keep_to_own_devices
from llava_cot_jax.hosts.process_group import ProcessGroup


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that puts PCI devices, each a vendor and a device, in the place of the machine's own."""
    for name in [name for name in os.environ if name.startswith(("TPU_", "JAX_LOCAL_DEVICE"))]:
        monkeypatch.delenv(name)
    before = CUDA_VISIBLE_DEVICES.value

    def put(*devices: tuple[str, str]) -> None:
        for number, (vendor, device) in enumerate(devices):
            folder: Path = tmp_path / f"0000:00:{number:02x}.0"
            folder.mkdir()
            (folder / "vendor").write_text(f"{vendor}\n")
            (folder / "device").write_text(f"{device}\n")
        monkeypatch.setattr(tpu_chips, "_DEVICES", tmp_path)

    yield put
    jax.config.update("jax_cuda_visible_devices", before)
    for name in [name for name in os.environ if name.startswith("TPU_")]:
        monkeypatch.delenv(name)


V5E, NETWORK_CARD, OTHER = ("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"), ("0x10de", "0x0063")


def test_chips_are_told_from_other_devices(machine):
    machine(V5E, NETWORK_CARD, OTHER, V5E)
    assert tpu_chips.count_tpu_chips() == 2


@pytest.mark.parametrize(("count", "bounds"), [(1, "1,1,1"), (4, "2,2,1"), (8, "2,4,1")])
def test_a_host_of_a_slice_keeps_to_its_chips(machine, monkeypatch, count, bounds):
    """Also where a cluster has described the slice by the variables' older names."""
    machine(*[V5E] * count, NETWORK_CARD)
    monkeypatch.setenv("TPU_HOST_BOUNDS", "2,2,1")
    keep_to_own_devices(ProcessGroup())
    assert os.environ["TPU_PROCESS_BOUNDS"] == os.environ["TPU_HOST_BOUNDS"] == "1,1,1"
    assert os.environ["TPU_CHIPS_PER_PROCESS_BOUNDS"] == os.environ["TPU_CHIPS_PER_HOST_BOUNDS"] == bounds


@pytest.mark.parametrize("chosen", ["TPU_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"])
def test_what_the_user_chose_stays(machine, monkeypatch, chosen):
    machine(*[V5E] * 4)
    monkeypatch.setenv(chosen, "1,2,1")
    keep_to_own_devices(ProcessGroup())
    assert {name for name in os.environ if name.startswith("TPU_")} == {chosen} and os.environ[chosen] == "1,2,1"


def test_no_tpu(machine):
    machine(NETWORK_CARD)
    keep_to_own_devices(ProcessGroup())
    assert not [name for name in os.environ if name.startswith("TPU_")]


def test_processes_of_a_machine_share_its_gpus(machine, monkeypatch):
    machine()
    keep_to_own_devices(ProcessGroup("localhost:1", 2, 1, local_devices=(2, 3)))
    assert CUDA_VISIBLE_DEVICES.value == "2,3"
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "1")
    keep_to_own_devices(ProcessGroup("localhost:1", 2, 1))
    assert CUDA_VISIBLE_DEVICES.value == "1"
