"""The commands of the README and the guides work, their links lead somewhere, and their figures have sources."""

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llava_cot_jax import cli
from llava_cot_jax.data.shapes.drawn import draw_questions

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = [ROOT / folder / "README.md" for folder in ("configs", "llava_cot_jax/search", "launch", "tests/evidence")]
TEXTS = {path: path.read_text() for path in (README, *GUIDES)}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [" ".join(part.split()) for line in LINES for part in re.split("&&|&$", line) if part.strip()]


def arguments_of_ours(command: str) -> list[str] | None:
    """Return the name of the package's command that a shell command starts, and its arguments, or None."""
    words = shlex.split(command)
    for i, word in enumerate(words):  # a launch script may stand before it
        if word == "llava-cot" and "".join(words[i + 1 : i + 2]) in cli.COMMANDS:
            return words[i + 1 :]
        if word.startswith("llava_cot_jax.") and words[i - 1] == "-m":
            return [word.removeprefix("llava_cot_jax."), *words[i + 1 :]]
    return None


OURS = [found for found in map(arguments_of_ours, COMMANDS) if found]


def test_the_commands_of_the_package_are_all_there():
    modules = {p.stem for p in (ROOT / "llava_cot_jax").glob("*.py") if "cli.run(main" in p.read_text()}
    assert {command for command, *_ in OURS} == modules
    assert set(re.findall(r"^\| `llava-cot (\w+)` \|", TEXTS[README], re.MULTILINE)) == modules


@pytest.mark.parametrize("command", OURS, ids=" ".join)
def test_a_command_parses(command, monkeypatch):
    """The real parser takes the arguments. The command itself does not run."""
    monkeypatch.chdir(ROOT)
    parsed = []

    class Parsed(Exception):
        pass

    parse = cli.Parser.parse_args

    def stop(self, arguments):
        parsed.append(parse(self, arguments))
        raise Parsed

    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    with pytest.raises(Parsed):
        importlib.import_module(f"llava_cot_jax.{command[0]}").main(command[1:])
    assert parsed


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("bash ", "python tests/"))])
def test_a_script_is_there(command):
    script = ROOT / command.split()[1]
    assert script.is_file()
    if script.suffix == ".sh":
        subprocess.run(["bash", "-n", script], check=True)


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 10_240


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    """Links between documents name a file and, after #, one of its headings as GitHub spells it."""
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", TEXTS[path], flags=re.DOTALL)):
        name, _, anchor = target.partition("#")
        document = (path.parent / name).resolve() if name else path
        assert document.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_readme_links_every_guide_and_a_guide_says_where_its_commands_run(guide):
    assert f"({guide.relative_to(ROOT)})" in TEXTS[README]
    introduction = TEXTS[guide].partition("```")[0]
    assert "for the root of the repository" in " ".join(introduction.split())
    assert "`source .venv/bin/activate`" in introduction


def test_the_runner_knows_the_same_documents():
    runner = runpy.run_path(str(ROOT / ".ci" / "readme.py"))
    assert [ROOT / name for name in runner["DOCUMENTS"]] == list(TEXTS)


def test_every_configuration_and_script_has_its_line_in_a_guide():
    configurations = TEXTS[GUIDES[0]].partition("## Files in this folder")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/]+\.yaml)`", configurations))
    assert named == {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    scripts = set(re.findall(r"^\| `(\w+\.sh)", TEXTS[ROOT / "launch" / "README.md"], re.MULTILINE))
    assert scripts == {path.name for path in (ROOT / "launch").glob("*.sh")}


@pytest.mark.slow
def test_the_staged_answer_of_the_readme_is_what_the_first_command_prints(tmp_path):
    """The answer and the drawn picture are those of the third question of ``configs/shapes_search.yaml``."""
    command = ["-m", "llava_cot_jax.generate", "--config", str(ROOT / "configs/shapes_search.yaml"), "--json"]
    command += ["--draw", "3", "--draw_to", str(tmp_path), "--page", str(tmp_path / "page.html"), "--show_search=false"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    shown = re.search(r"```text\n(.*?)```", TEXTS[README], re.DOTALL)[1]
    assert " ".join(shown.split()) == " ".join(answer["text"].split())
    assert answer["question"] in TEXTS[README]
    grid = re.search(r"```mermaid\nblock-beta\n(.*?)```", TEXTS[README], re.DOTALL)[1]
    cells = dict(zip("123456789", re.findall(r'"([ ★])"', grid)[1:], strict=True))
    stars = [f"{'abc'[i // 3]}{i % 3 + 1}" for i, cell in enumerate(cells.values()) if cell == "★"]
    assert stars == re.findall(r"\b([abc][123])\b", answer["stages"]["CAPTION"])


@pytest.mark.slow
def test_the_library_in_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_questions(Path("runs/shapes_search"), 4, seed=0)  # as the README's first command does
    code = re.search(r"```python\n(.*?)```", TEXTS[README], re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 10
    Path("snippet.py").write_text(code)
    runpy.run_path("snippet.py")
    conclusion, log_prob = capsys.readouterr().out.split()
    assert conclusion == "two" and float(log_prob) <= 0
    assert (tmp_path / "runs/copy/model.safetensors").exists()


def test_every_figure_has_a_script_and_its_output():
    guide = ROOT / "tests" / "evidence"
    text = TEXTS[guide / "README.md"]
    named = set(re.findall(r"python tests/evidence/(\w+)\.py", text))
    assert named == {path.stem for path in guide.glob("*.py")}
    assert {path.stem for path in guide.glob("*.txt")} == named - {"versions"} | {
        "versions_oldest",
        "versions_newest",
        "bench_cpu",
    }
