"""Help texts and early errors import no slow package, and no answer imports torch.

The tests look at imported packages rather than at seconds, which depend on the machine.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

import llava_cot_jax
from llava_cot_jax import cli
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER
from tests.processes import ROOT, xla_flags

SLOW = ("flax", "grain", "jax", "optax", "orbax", "tensorflow_datasets", "torch", "transformers")
"""Packages that each take from a third of a second to some seconds to import."""

WATCHED = """
import os, runpy, sys
slow, module, leave = sys.argv[1].split(), sys.argv[2], os._exit
del sys.argv[1:3]
def tell():
    print("imported:", *(name for name in slow if name in sys.modules), file=sys.stderr, flush=True)
def tell_and_leave(code):
    tell()
    leave(code)
os._exit = tell_and_leave
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    tell()
"""


@dataclass(frozen=True)
class Ended:
    """The end of a process.

    Attributes:
        code: Exit code.
        out: Text on stdout.
        error: Text on stderr.
        imported: Packages of ``SLOW`` that the process imported.
    """

    code: int
    out: str
    error: str
    imported: set[str]


WITH_TORCH = os.environ | {"PYTHONPATH": str(ROOT)}
"""Environment of a user who has installed torch."""


def run(command: str, *arguments: str, **environment: str) -> Ended:
    """Run a command, or with "" the program that has all commands, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, " ".join(SLOW), f"llava_cot_jax.{command}".rstrip("."), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=WITH_TORCH | environment,
    )
    error, _, imported = done.stderr.rpartition("imported:")
    return Ended(done.returncode, done.stdout, error, set(imported.split()))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command: str) -> None:
    ended = run(command, "--help")
    assert ended.code == 0 and ended.out.startswith("usage:")
    assert not ended.imported


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["train", "--help"], ["generate", "--sede", "1"]])
def test_the_program_of_all_commands(arguments: list[str]) -> None:
    ended = run("", *arguments)
    assert ended.code == (2 if "--sede" in arguments else 0)
    assert not ended.imported


ASKED = ["--checkpoint", "shapes", "--question", "x"]
MEASURED = ["--benchmark", "shapes", "--output", "o"]
ROLLED = ["--data", "shapes", "--limit", "4", "--output", "o"]
RUN = ["--output", "o", "--checkpoint", "shapes", "--data", "shapes"]
RAW = ["--annotations", "no", "--images", "no", "--output", "o"]

MADE = ["--input", "no.jsonl", "--images", "no", "--output", "o.jsonl", "--model", "self"]

WRONG = [
    *((command, ["--nonsense", "3"], "unrecognized arguments") for command in cli.COMMANDS),
    ("bench", ["--random", "100m", "--runs", "0"], "runs is 0; it must be at least 1"),
    ("annotate", [*MADE, "--tries", "0"], "tries is 0; it must be at least 1"),
    ("annotate", [*MADE[:-1], "gpt-4o", "--seed", "3"], "--seed has a meaning only with --model self"),
    (
        "bench",
        ["--random", "100m", "--workload.prompt_tokens", "0"],
        "workload.prompt_tokens is 0; it must be at least 1",
    ),
    ("convert", ["a", "b", "--dtype", "float8"], "float8"),
    ("convert", ["shapes", "b", "--step", "3"], "--step is for the folder of a training run"),
    ("evaluate", [*MEASURED, "--limit", "0"], "limit is 0; it must be at least 1"),
    ("evaluate", [*MEASURED, "--benchmark", "mmstr"], "there is no benchmark mmstr: the benchmarks are shapes"),
    ("evaluate", [*MEASURED, "--tolerance", "-1"], "tolerance is -1.0; it must not be negative"),
    ("generate", [*ASKED, "--mesh.data", "0"], "mesh.data is 0"),
    ("generate", [*ASKED, "--temperature", "-1"], "temperature is -1.0; it must not be negative"),
    (
        "generate",
        [*ASKED, "--search", "stage_beam", "--num_candidates", "0"],
        "num_candidates is 0; it must be at least 1",
    ),
    ("plan", [*RUN, "--topology", "v9-8"], "is no slice"),
    ("plan", [*RUN, "--topology", "v5e-8", "--lora.rank", "-1"], "lora.rank is -1"),
    ("prepare", [*RAW, "--max_side", "0"], "max_side is 0"),
    ("rollout", ["--output", "o"], "there are no questions: give --data"),
    ("rollout", [*ROLLED, "--continuations", "0"], "continuations is 0; it must be at least 1"),
    ("rollout", [*ROLLED, "--first", "-1"], "first is -1; it must be at least 0"),
    ("rollout", [*ROLLED, "--format", "llamav_o1"], "format llamav_o1 asks for its stages in several turns"),
    ("rollout", [*ROLLED, "--search", "best_of_n"], "search with stage_beam (--search stage_beam)"),
    ("rollout", ["--data", "shapes", "--limit", "4"], "--output is missing"),
    ("serve", ["--slots", "0"], "slots is 0; it must be at least 1"),
    ("serve", ["--host", "0.0.0.0"], "set the environment variable LLAVA_COT_API_KEY to a key that they must send"),
    ("serve", ["--host", "no.such.host.invalid"], "there is no host no.such.host.invalid"),
    ("serve", ["--port", "70000"], "port is 70000; it must be from 0"),
    ("serve", ["--search", "retracing"], "--search retracing answers no questions side by side"),
    ("serve", ["--searches", "greedy", "best"], "--searches: there is no search 'best'"),
    ("serve", ["--searches", "sample", "best_of_n", "majority_vote", "stage_beam"], "give a higher --kept_searches"),
    ("serve", ["--local_images", "nowhere"], "--local_images nowhere is no folder"),
    ("train", [*RUN, "--optimizer.b1", "2"], "b1 is 2"),
    ("train", [*RUN, "--hosts.count", "2"], "give --hosts.coordinator and --hosts.index too"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "arguments", "message"), WRONG, ids=[f"{c} {a[-2:]}" for c, a, _ in WRONG])
def test_a_wrong_argument(command: str, arguments: list[str], message: str) -> None:
    ended = run(command, *arguments)
    assert ended.code == 2 and message in ended.error
    assert not ended.imported


MISSING = [
    ("annotate", MADE, "no.jsonl does not exist"),
    ("annotate", [*MADE, "--input", __file__, "--images", "nowhere"], f"there is no {ROOT}/nowhere"),
    ("bench", ["--checkpoint", "./nowhere"], f"no such folder: {ROOT}/nowhere"),
    ("bench", ["--random", "100m", "--workload", "nowhere.yaml"], "nowhere.yaml"),
    ("convert", ["nowhere", "out"], f"no such folder: {ROOT}/nowhere"),
    ("convert", ["{folder}/shards", "out"], "b.safetensors does not exist"),
    ("evaluate", [*MEASURED, "--benchmark", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ("evaluate", [*MEASURED, "--limit", "1", "--checkpoint", "nowhere"], f"no such folder: {ROOT}/nowhere"),
    ("generate", ["--checkpoint", "nowhere", "--question", "x"], f"no such folder: {ROOT}/nowhere"),
    ("generate", ["--checkpoint", "{folder}/shards", "--question", "x"], "b.safetensors does not exist"),
    ("generate", ["--checkpoint", "{folder}/untold", "--question", "x"], "lacks tokenizer.json"),
    ("generate", [*ASKED, "--image", "nowhere.png"], "image nowhere.png does not exist"),
    ("generate", [*ASKED, "--search", "stage_beam", "--judge_prompts", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ("generate", [*ASKED, "--search", "greedy", "--trace", f"{__file__}/t.json"], "t.json cannot be written"),
    ("generate", [*ASKED, "--search", "greedy", "--page", "tests"], "tests cannot be written: it is a folder"),
    ("plan", ["--config", "nowhere.yaml", "--topology", "v5e-8"], "nowhere.yaml"),
    ("plan", ["--search", "greedy", "--checkpoint", "nowhere", "--topology", "v5e-8"], "nowhere is no folder"),
    (
        "prepare",
        ["--annotations", "nowhere", "--images", "{folder}", "--output", "o"],
        f"annotations {ROOT}/nowhere cannot",
    ),
    (
        "prepare",
        ["--annotations", __file__, "--images", "nowhere.zip", "--output", "o"],
        f"there is no {ROOT}/nowhere.zip",
    ),
    ("prepare", ["--show", "nowhere"], "nowhere is no prepared data set"),
    ("prepare", ["--show", "shapes", "--checkpoint", "{folder}/untold"], "lacks tokenizer.json"),
    ("prepare", ["--show", "shapes", "--checkpoint", "nowhere"], f"no such folder: {ROOT}/nowhere"),
    ("rollout", [*ROLLED, "--data", "nowhere"], "nowhere is no prepared data set"),
    ("rollout", [*ROLLED, "--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ("rollout", [*ROLLED, "--checkpoint", "nowhere"], f"no such folder: {ROOT}/nowhere"),
    ("serve", ["--checkpoint", "nowhere"], f"no such folder: {ROOT}/nowhere"),
    ("train", ["--config", "nowhere.yaml"], "nowhere.yaml"),
    ("train", [*RUN, "--output", ""], "a path is empty"),
    ("train", [*RUN, "--output", f"{__file__}/run"], "is not a folder"),
    ("train", [*RUN, "--config", "{folder}/binary.yaml"], "no text in UTF-8"),
    ("generate", [*ASKED, "--search", "stage_beam", "--judge_prompts", "{folder}/binary.yaml"], "binary.yaml"),
    ("train", [*RUN[:4], "--data", "nowhere"], "nowhere is no prepared data set"),
    ("train", [*RUN, "--checkpoint", "./nowhere"], f"no such folder: {ROOT}/nowhere"),
    ("train", [*RUN, "--checkpoint", "{folder}/shards"], "b.safetensors does not exist"),
    ("train", [*RUN, "--checkpoint", "{folder}/untold"], "lacks tokenizer.json"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints: one lacks a file of weights, the other its tokenizer."""
    folder = tmp_path_factory.mktemp("missing")
    for name in ("shards", "untold"):
        shutil.copytree(BUNDLED_MODEL_FOLDER, folder / name)
    (folder / "untold" / "tokenizer.json").unlink()
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\n")
    (folder / "shards" / "model.safetensors").rename(folder / "shards" / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("command", "arguments", "message"), MISSING, ids=[f"{c} {a[-2:]}" for c, a, _ in MISSING])
def test_a_missing_file(folder: Path, command: str, arguments: list[str], message: str) -> None:
    ended = run(command, *(argument.format(folder=folder) for argument in arguments))
    assert ended.code == 2 and message in ended.error
    assert ended.error.startswith("error: ") and ended.error.count("\n") == 1
    assert not ended.imported


SEARCH = ["--search", "stage_beam", "--num_candidates", "1", "--max_new_tokens", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], SEARCH], ids=["streamed", "searched"])
def test_an_answer_takes_no_torch(tmp_path: Path, how: list[str]) -> None:
    """An answer imports no torch, even where it is installed, as in the tests."""
    pytest.importorskip("torch")
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    arguments = [*ASKED, "--image", str(tmp_path / "picture.png"), "--dtype", "float32", "--json"]
    arguments += how or ["--max_new_tokens", "2"]
    ended = run("generate", *arguments, XLA_FLAGS=xla_flags(devices=1))
    assert ended.code == 0 and json.loads(ended.out)["text"]
    assert {"jax", "transformers"} <= ended.imported and "torch" not in ended.imported
    assert (
        "warning: " in ended.error and "cut at the limit of new tokens" in ended.error
    )  # the command runs as __main__


def test_the_package_alone_imports_nothing_slow() -> None:
    code = "import sys, llava_cot_jax; llava_cot_jax.StageBeam; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=WITH_TORCH)
    assert not set(done.stdout.split()) & {*SLOW, "numpy"}


def test_every_name_of_the_package() -> None:
    assert set(llava_cot_jax.__all__) == llava_cot_jax._MODULE_OF.keys() <= set(dir(llava_cot_jax))
    for name, module in llava_cot_jax._MODULE_OF.items():
        assert getattr(llava_cot_jax, name).__module__ == module
    everything: dict[str, object] = {}
    exec("from llava_cot_jax import *", everything)
    assert everything.keys() >= set(llava_cot_jax.__all__)


def test_a_name_that_the_package_lacks() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        llava_cot_jax.Nonsense  # noqa: B018


@pytest.mark.slow
def test_libtpu_says_nothing_on_a_machine_without_a_tpu() -> None:
    """libtpu comes with the extras ``plan`` and ``test``, and by default prints a trace where it finds no TPU."""
    assert find_spec("libtpu")
    environment = {name: value for name, value in WITH_TORCH.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "llava_cot_jax.generate", "--question", "How many?", "--max_new_tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert " ".join(done.stderr.split()).startswith("No --checkpoint was given") and "TPU" not in done.stderr
