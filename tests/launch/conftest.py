"""Laptops."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.laptop import ROOT, ZONE, Laptop


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository with the scripts, and junk that was never committed."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("llava_cot_jax/__init__.py", "configs/one.yaml"):
        (root / name).parent.mkdir()
        (root / name).write_text("# committed\n")
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    (root / "llava_cot_jax/__init__.py").write_text("# changed\n")
    (root / "secret.txt").write_text("junk\n")
    return root


@pytest.fixture
def laptop(checkout: Path, tmp_path: Path) -> Iterator[Laptop]:
    laptop = Laptop(checkout, tmp_path)
    laptop.trains("0")
    yield laptop
    laptop.end()


@pytest.fixture
def installed(laptop: Laptop) -> Laptop:
    """With the checkout on its two hosts, and no calls noted yet."""
    laptop.script(hosts=2)
    assert laptop.run("install", "tpu", ZONE).returncode == 0
    (laptop.folder / "calls.jsonl").unlink()
    return laptop
