"""Paths as a user types them: relative, below ``~``, with a space and an umlaut; and runs that were moved."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file

from llava_cot_jax import Mllama, MllamaConfig, Processor, Reasoner, StageBeam, cli, train
from llava_cot_jax.data.shapes.drawn import draw_questions
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import cache_folder
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER, as_path
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS
from llava_cot_jax.train import read_arguments
from llava_cot_jax.training.checkpoints import steps_in
from llava_cot_jax.training.layout import relocated
from llava_cot_jax.training.loop import TrainResult, _Loop
from llava_cot_jax.training.state import TrainState
from tests.data.raw.raw_set import make_raw_set
from tests.training.small_run import arguments, environment, write_small
from tests.training.stepless import Place, compute_nothing

PLACE = "my files für mich"
"""A folder whose name a shell and a careless program stumble over."""


class TestAsPath:
    def test_relative_to_the_working_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert as_path("runs/größer als") == tmp_path / "runs/größer als"
        monkeypatch.chdir("/")
        assert as_path("runs") == Path("/runs")

    def test_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert as_path("~/x") == tmp_path / "x"
        with pytest.raises(UserError, match="~nobody-at-all/x: there is no such user"):
            as_path("~nobody-at-all/x")

    def test_above_a_symbolic_link_is_above_what_it_points_to(self, tmp_path, monkeypatch):
        (tmp_path / "far/away").mkdir(parents=True)
        (tmp_path / "near").mkdir()
        (tmp_path / "near/link").symlink_to(tmp_path / "far/away")
        monkeypatch.chdir(tmp_path / "near")
        (tmp_path / "far/file").write_text("there")
        assert as_path("link/../file").read_text() == "there"
        assert as_path("link/x") == tmp_path / "near/link/x"  # a link that a user names stays in the name

    @pytest.mark.parametrize("nothing", ["", "  "])
    def test_empty(self, nothing):
        with pytest.raises(UserError, match="a path is empty"):
            as_path(nothing)

    def test_no_working_directory(self, tmp_path, monkeypatch):
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(UserError, match="the working directory no longer exists"):
            as_path("runs")

    def test_the_cache(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", "kept here")
        assert cache_folder("index") == tmp_path / "kept here/llava_cot_jax/index"
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder("index") == tmp_path / ".cache/llava_cot_jax/index"


class TestRelocated:
    def settings(self, root: Path) -> dict[str, str]:
        return {"output": f"{root}/runs/one", "data": f"{root}/data", "checkpoint": f"{root}/base"}

    def test_what_moved_with_the_run_is_found(self, tmp_path):
        (tmp_path / "new/base").mkdir(parents=True)
        found = relocated(self.settings(tmp_path / "old"), tmp_path / "new/runs/one")
        assert found["checkpoint"] == str(tmp_path / "new/base")
        assert found["data"] == f"{tmp_path}/old/data"  # which is nowhere: named as it was stored

    def test_several_data_sets_and_one_to_validate_on(self, tmp_path):
        for name in ("one", "two", "three"):
            (tmp_path / "new" / name).mkdir(parents=True)
        old = tmp_path / "old"
        given = self.settings(old) | {
            "data": {f"{old}/one": 2.0, "shapes": 0.5, f"{old}/gone": 1.0, f"{tmp_path}/new/two": 1.0},
            "validation_data": f"{old}/three",
        }
        found = relocated(given, tmp_path / "new/runs/one")
        new = tmp_path / "new"
        assert found["data"] == {f"{new}/one": 2.0, "shapes": 0.5, f"{old}/gone": 1.0, f"{new}/two": 1.0}
        assert found["validation_data"] == f"{new}/three"

    def test_what_is_still_there_is_not_looked_for(self, tmp_path):
        for root in ("old", "new"):
            (tmp_path / root / "base").mkdir(parents=True)
        found = relocated(self.settings(tmp_path / "old"), tmp_path / "new/runs/one")
        assert found["checkpoint"] == f"{tmp_path}/old/base"

    def test_what_shares_the_root_alone_did_not_move_along(self, tmp_path):
        given = {"output": "/gone/runs/one", "data": "/elsewhere/tmp", "checkpoint": "/gone/tmp"}
        assert relocated(given, Path("/x")) == given
        assert relocated(given, Path("/x/runs/one")) == given

    def test_a_place_that_is_closed_is_not_there(self, tmp_path, monkeypatch):
        def refuse(path: Path) -> bool:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "exists", refuse)
        assert relocated(self.settings(tmp_path), tmp_path / "new/runs/one") == self.settings(tmp_path)

    def test_names_stay(self, tmp_path):
        given = {"output": "/gone/run", "data": "shapes", "checkpoint": "meta-llama/Llama-3.2-11B-Vision-Instruct"}
        assert relocated(given, tmp_path) == given


class TestConfigurationOfARun:
    @pytest.fixture
    def moved(self, tmp_path, monkeypatch) -> Path:
        """A run that lay in ``old``, with a base beside it, and has moved to ``new``."""
        (tmp_path / "new/runs/one/checkpoints").mkdir(parents=True)
        (tmp_path / "new/base").mkdir()
        old = tmp_path / "old"
        content = f"output: {old}/runs/one\ncheckpoint: {old}/base\ndata: {old}/data\n"
        (tmp_path / "new/runs/one/config.yaml").write_text(content)
        (tmp_path / "more.yaml").write_text("steps: 9\n")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("more", [[], ["--config", "more.yaml"], ["--steps", "9"]])
    def test_it_goes_on_where_it_lies(self, moved, more):
        settings, _ = read_arguments(["--config", "new/runs/one/config.yaml", *more])
        assert settings.output == str(moved / "new/runs/one") and settings.checkpoint == str(moved / "new/base")
        assert settings.data == f"{moved}/old/data" and settings.steps == (9 if more else None)

    @pytest.mark.parametrize("output", ["old/runs/one", "elsewhere"])
    def test_an_output_that_is_given_counts(self, moved, output):
        for given in (["--output", output], [f"--output={output}"]):
            assert read_arguments(["--config", "new/runs/one/config.yaml", *given])[0].output == output
        (moved / "more.yaml").write_text("output: elsewhere\n")
        settings, _ = read_arguments(["--config", "new/runs/one/config.yaml", "--config", "more.yaml"])
        assert settings.output == "elsewhere"

    def test_a_path_that_is_given_counts(self, moved):
        settings, _ = read_arguments(["--config", "new/runs/one/config.yaml", "--checkpoint", "/old/base"])
        assert settings.checkpoint == "/old/base"

    def test_the_last_of_two_runs_counts(self, moved):
        shutil.copytree(moved / "new/runs/one", moved / "new/runs/two")
        given = ["--config", "new/runs/one/config.yaml", "--config", "new/runs/two/config.yaml"]
        assert read_arguments(given)[0].output == str(moved / "new/runs/two")


class Shell:
    """Runs commands of the package in this process, from a working directory that is also the user's home.

    Training computes nothing: it adds 0.1 to each trained parameter.

    Attributes:
        place: the working directory.
    """

    def __init__(self, place: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self._cache, self._capsys = place, cache, capsys

    def __call__(self, name: str, *given: str, code: int = 0) -> str:
        """Run a command, and return what it writes: to stdout, or to stderr where it fails with ``code``."""
        self._capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.place)
            patch.setenv("HOME", str(self.place))
            patch.setenv("XDG_CACHE_HOME", str(self._cache))
            patch.setattr(sys, "argv", [name, *given])
            # jax joins hosts before its first computation alone, which this process has behind it.
            patch.setattr(train, "join_hosts", lambda group: None)
            compute_nothing(patch, self._run_steps)
            try:
                cli.run(import_module(f"llava_cot_jax.{name}").main)
                ended = 0
            except SystemExit as end:
                ended = end.code
        written = self._capsys.readouterr()
        assert ended == code, written.err
        return written.err if code else written.out

    def _run_steps(self, steps: _Loop, state: TrainState, first: int, last: int) -> TrainResult:
        changed = replace(state, trained=jax.tree.map(lambda x: x + 0.1, state.trained))
        return Place(self.place).run_steps(steps, changed, first, last)


@pytest.fixture
def shell(tmp_path, cache, capsys) -> Shell:
    (tmp_path / PLACE).mkdir()
    return Shell(tmp_path / PLACE, cache, capsys)


@pytest.mark.slow
def test_a_run_of_adapters_is_gone_on_with_moved_and_exported(shell, cache, tmp_path, capsys):
    """Its folder, its base and its data are named relatively, and move together to another place."""
    write_small(shell.place / "die Basis")
    few = {"eval_examples": 0, "checkpoints.every": 2, "lora.rank": 2}
    name = "Läufe/der erste"
    shell("train", *arguments("die Basis", name, steps=2, **few))
    assert (shell.place / name / "checkpoints/2").is_dir()

    # The same run, from another working directory and from its own configuration file.
    elsewhere = Shell(tmp_path, cache, capsys)
    printed = elsewhere("train", "--config", f"{PLACE}/{name}/config.yaml", "--steps", "4", "--accept_changes", "true")
    assert "resuming from step 2" in printed and steps_in(shell.place / name / "checkpoints")[-1] == 4

    (tmp_path / "new home").mkdir()
    moved = Shell(shell.place.rename(tmp_path / "new home/ganz woanders"), cache, capsys)
    printed = moved("train", "--config", f"{name}/config.yaml", "--steps", "6", "--accept_changes", "true")
    assert "resuming from step 4" in printed and "checkpoint was" not in printed
    assert steps_in(moved.place / name / "checkpoints")[-1] == 6 and not shell.place.exists()

    # Its configuration file counts wherever it stands among others, and by another name.
    (moved.place / "mehr.yaml").write_text("log_every: 1\n")
    (moved.place / "Verweis.yaml").symlink_to(moved.place / name / "config.yaml")
    more = ["--config", "Verweis.yaml", "--config", "mehr.yaml", "--steps", "6", "--accept_changes", "true"]
    assert "resuming from step 6" in moved("train", *more)

    # The base lies where it lay beside the run; then it has gone, and --base says where.
    moved("convert", name, "exportiert/das Modell")
    (moved.place / "die Basis").rename(moved.place / "anderswo")
    error = moved("convert", name, "noch einmal", code=2)
    assert "die Basis" in error and "--base" in error and error.count("\n") == 1
    moved("convert", name, "~/noch einmal", "--base", "anderswo")
    one, other = (load_file(moved.place / f / "model.safetensors") for f in ("exportiert/das Modell", "noch einmal"))
    base = load_file(moved.place / "anderswo/model.safetensors")
    assert all((one[tensor] == other[tensor]).all() for tensor in one)
    changed = {tensor for tensor in base if (one[tensor] != base[tensor]).any()}
    assert changed == {tensor for tensor in base if re.search(r"^language_model.*_proj\.weight$", tensor)}

    # A run that is named where a checkpoint is wanted.
    assert "llava_cot_jax.convert" in moved("generate", "--checkpoint", name, "--question", "What?", code=2)


@pytest.mark.slow
def test_data_is_prepared_looked_at_named_by_a_run_and_moved(shell):
    (shell.place / "roh für alle").mkdir()
    raw = make_raw_set(shell.place / "roh für alle")
    raw.write_zip(shell.place / "roh für alle/alle Bilder.zip")
    given = ["--annotations", f"roh für alle/{raw.annotations.name}", "--images", "roh für alle/alle Bilder.zip"]
    given += ["--allow_missing", str(len(raw.skipped)), "--validation_share", "0.1", "--workers", "0"]
    shell("prepare", *given, "--output", "~/Daten/fertig gemacht")
    assert (shell.place / "Daten/fertig gemacht/prepared.json").is_file()
    shell("prepare", "--show", "Daten/fertig gemacht", "--rows", "1", "--sheet", "ein Blatt.png")
    assert (shell.place / "ein Blatt.png").is_file()

    few = {"steps": 2, "eval_examples": 0, "chat.max_length": 256, "loader.batch_size": 8}
    shell("train", *arguments("shapes", "Lauf", **few), "--data", "Daten/fertig gemacht")
    (shell.place / "Daten").rename(shell.place / "Daten neu")
    again = [*arguments("shapes", "Lauf", **few), "--data", "./Daten neu/fertig gemacht", "--steps", "3"]
    assert "resuming from step 2" in shell("train", *again, "--accept_changes", "true")


@pytest.mark.slow
def test_answers_searches_and_benchmarks(shell):
    write_small(shell.place / "Modell für mich")
    shell("prepare", "--show", "shapes", "--rows", "1", "--sheet", "~/Bild & Blatt.png")
    prompts = Path(__file__).parents[1] / "llava_cot_jax/processing/judge_prompts.yaml"
    shutil.copy(prompts, shell.place / "Fragen des Richters.yaml")
    given = [
        "--checkpoint",
        "Modell für mich",
        "--image",
        "~/Bild & Blatt.png",
        "--question",
        "What is at a1?",
        "--json",
    ]
    search = ["--search", "stage_beam", "--num_candidates", "2", "--max_new_tokens", "24", "--judge_prompts"]
    search += ["Fragen des Richters.yaml", "--trace", "Spuren/eine Spur.json"]
    answer = json.loads(shell("generate", *given, *search))
    (trace,) = json.loads((shell.place / "Spuren/eine Spur.json").read_text(encoding="utf-8"))
    assert trace["stages"][3]["stage"] == "CONCLUSION" and answer["stages"]

    (shell.place / "kurze Arbeit.yaml").write_text(
        "{prompt_tokens: 9, image_tiles: 1, stage_tokens: [3, 2], num_candidates: [1]}"
    )
    few = ["--dtype", "float32", "--runs", "1", "--workload", "kurze Arbeit.yaml", "--json"]
    assert '"row"' in shell("bench", "--checkpoint", "Modell für mich", *few)

    (shell.place / "ein Plan.yaml").write_text("{output: Lauf, checkpoint: ./Modell für mich, data: ./nirgends}")
    planned = shell("plan", "--config", "ein Plan.yaml", "--topology", "v5e-1", "--compile", "false", "--json")
    assert json.loads(planned)["chips"] == 1


@pytest.mark.slow
def test_caches_may_be_named_relatively(shell, tmp_path):
    given = ["--question", "How many stars are there?", "--max_new_tokens", "4"]
    names = {"XDG_CACHE_HOME": "ein Cache", "JAX_COMPILATION_CACHE_DIR": "~/kompiliert für später"}
    done = subprocess.run(
        [sys.executable, "-m", "llava_cot_jax.generate", "--checkpoint", "shapes", *given],
        cwd=shell.place,
        env=environment(tmp_path) | names | {"HOME": str(shell.place)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert any((shell.place / "kompiliert für später").iterdir())
    assert not os.path.lexists(shell.place / "~")


@pytest.mark.slow
def test_the_library_takes_such_paths_too(tmp_path, monkeypatch):
    home = tmp_path / PLACE
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    Mllama.from_pretrained("shapes").save_pretrained("~/ein Modell")
    for path in BUNDLED_MODEL_FOLDER.glob("*.json"):
        shutil.copy(path, home / "ein Modell")
    (drawn,) = draw_questions(as_path("~/Bilder"), 1, seed=0)
    shutil.copy(DEFAULT_JUDGE_PROMPTS, home / "Prüfung.yaml")
    for folder in ("~/ein Modell", f"{PLACE}/ein Modell", f"./{PLACE}/../{PLACE}/ein Modell"):
        assert MllamaConfig.from_pretrained(folder) == MllamaConfig.from_pretrained("shapes")
        processor = Processor.from_pretrained(folder)
        model = Mllama.from_pretrained(folder)
    reasoner = Reasoner(model, processor, StageBeam(1, max_new_tokens=4), judge_prompts="~/Prüfung.yaml")
    for image in (f"~/Bilder/{drawn.image.name}", f"{PLACE}/Bilder/{drawn.image.name}"):
        assert reasoner.answer(image, drawn.question).text
