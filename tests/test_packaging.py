"""The wheel: what it contains and says of itself, and that it works outside the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml

from tests.processes import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "configs", "llava_cot_jax")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of a wheel that is built without a network from a copy of the repository, unpacked as by pip."""
    folder = tmp_path_factory.mktemp("package")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name, **({"symlinks": True} if copy is shutil.copytree else {}))
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture(scope="module")
def metadata(installed: Path) -> Message:
    (path,) = installed.glob("*.dist-info/METADATA")
    return message_from_bytes(path.read_bytes())


def test_it_has_every_file_of_the_package_and_no_other(installed):
    package = installed / "llava_cot_jax"
    got = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    ours = {path for path in (ROOT / "llava_cot_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    want = {path.relative_to(ROOT / "llava_cot_jax").as_posix() for path in ours if path.name != "README.md"}
    assert got == want | {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert {"py.typed", "configs/shapes_cpu.yaml", "shapes_model/model.safetensors"} <= got
    assert not any((installed / name).exists() for name in ("tests", "configs"))


def test_what_it_says_of_itself(metadata):
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(classifiers)
    assert metadata["Requires-Python"] == ">=3.11" and metadata["License-Expression"] == "Apache-2.0"
    assert all(url.partition(", ")[2].startswith("https://") for url in metadata.get_all("Project-URL"))


def test_its_configurations_and_version_outside_the_repository(installed, metadata, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "llava_cot_jax", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = yaml.safe_load(run("train", "--config", "configs/shapes_cpu.yaml", "--print_config"))
    assert options["data"] == "shapes" and options["output"]
    assert run("--version") == f"llava-cot {metadata['Version']}\n"
