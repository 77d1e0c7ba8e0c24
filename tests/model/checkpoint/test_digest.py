"""The digest of weights against checksums of whole files, and what it tells apart."""

import hashlib
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from llava_cot_jax.model.checkpoint import digest as digest_module
from llava_cot_jax.model.checkpoint.digest import WeightsDigest, join_checksums

FILES = {"model-00001-of-00002.safetensors": 100_003, "model-00002-of-00002.safetensors": 7_000}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of weights, of which the larger has several pieces."""
    monkeypatch.setattr(digest_module, "_PIECE_BYTES", 30_000)
    draw = np.random.default_rng(0)
    for name, size in FILES.items():
        (tmp_path / name).write_bytes(draw.bytes(size))
    return tmp_path


def digest_of(folder: Path) -> str:
    with WeightsDigest(folder) as digest:
        return digest.result()


def test_it_is_made_of_the_checksums_of_whole_files(folder):
    contents = [(folder / name).read_bytes() for name in FILES]
    found = sorted((len(content), google_crc32c.value(content)) for content in contents)
    assert digest_of(folder) == hashlib.sha256(repr(found).encode()).hexdigest()[:16]


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (3, 7), (1000, 54_321)])
def test_checksums_of_parts_are_joined(sizes):
    first, second = (np.random.default_rng(1).bytes(size) for size in sizes)
    joined = join_checksums(google_crc32c.value(first), google_crc32c.value(second), len(second))
    assert joined == google_crc32c.value(first + second)


def test_a_copy_has_the_same_one_and_any_other_bytes_another(folder, tmp_path_factory):
    known = digest_of(folder)
    copy = tmp_path_factory.mktemp("copy") / "elsewhere"
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text("{}")
    assert digest_of(copy) == known
    for name, size in FILES.items():
        for position in (0, 29_999, 30_000, size - 1):
            content = bytearray((copy / name).read_bytes())
            content[min(position, size - 1)] ^= 1
            (copy / name).write_bytes(content)
            assert digest_of(copy) != known, (name, position)
            shutil.copy(folder / name, copy / name)
    assert digest_of(copy) == known
    (copy / "model-00002-of-00002.safetensors").unlink()
    assert digest_of(copy) != known


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_processes_divide_the_bytes(folder, processes):
    """No piece is read twice; together they make the digest that one process makes."""
    parts: list[np.ndarray] = []

    def keep(part: np.ndarray) -> np.ndarray:
        parts.append(part)
        return part

    digests = [WeightsDigest(folder, (index, processes)) for index in range(processes)]
    for digest in digests:
        digest.result(keep)
    together = np.stack(parts)
    assert ((together != 0).sum(0) == 1).all() and together.shape[1] == 5
    assert digests[0].result(lambda _: together.sum(0, dtype=np.uint32)) == digest_of(folder)
