"""CI runs the commands of the README and the guides: tests of the runner on made-up documents and on the real ones."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNNER = ROOT / ".ci" / "readme.py"
GUIDES = ("configs", "llava_cot_jax/search", "launch", "tests/evidence")
"""Folders of the guides in the order in which their commands are run."""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A repository with the runner, empty guides and an environment, in a folder whose name has spaces."""
    root = tmp_path / "a folder of mine"
    (root / ".ci").mkdir(parents=True)
    shutil.copy(RUNNER, root / ".ci")
    for guide in GUIDES:
        (root / guide).mkdir(parents=True)
        (root / guide / "README.md").touch()
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return root


def start(root: Path, readme: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the runner does with a README, from another folder than the repository."""
    (root / "README.md").write_text(readme, encoding="utf-8")
    command = [sys.executable, str(root / ".ci" / "readme.py"), *arguments]
    return subprocess.run(command, cwd=root.parent, capture_output=True, text=True, input="typed\n", timeout=60)


def written(root: Path) -> list[str]:
    return (root / "log").read_text().split()


def test_commands_run_in_order_in_the_repository(folder):
    done = start(
        folder,
        "Text, `echo inline >> log`.\n\n```bash\n# a comment\necho one >> log\n\necho two \\\n  two >> log\n```\n\n"
        "```text\necho text >> log\n```\n\n```python\nopen('log', 'a').write('three ')\nx = 1\n```\n\n"
        "```python\nopen('log', 'a').write('fresh ' if 'x' not in globals() else 'old ')\n```\n\n"
        '```bash\nmkdir "b c" && echo four > "b c/d" && cat "b c/d" >> log\n```\n',
    )
    assert done.returncode == 0, done.stderr
    assert written(folder) == ["one", "two", "two", "three", "fresh", "four"]
    lines = done.stdout.splitlines()
    assert lines[:2] == ["+ echo one >> log", "(exit 0 after 0 s)"]
    assert "+ echo two \\\n  two >> log\n(exit 0" in done.stdout


def test_the_guides_follow_the_readme_in_their_order(folder):
    for guide in reversed(GUIDES):
        text = f"`source .venv/bin/activate`\n\n```bash\necho {guide} $VIRTUAL_ENV >> log\n```\n"
        (folder / guide / "README.md").write_text(text)
    done = start(folder, "```bash\necho first ${VIRTUAL_ENV:-} >> log\n```\n")
    assert done.returncode == 0, done.stderr
    lines = (folder / "log").read_text().splitlines()
    assert lines == ["first", *[f"{guide} {folder}/.venv" for guide in GUIDES]]


def test_a_failure_in_a_guide_names_it(folder):
    (folder / "launch" / "README.md").write_text("```bash\nfalse\n```\n")
    done = start(folder, "")
    assert done.returncode != 0
    assert "launch/README.md line 2 failed with exit 1: false" in done.stderr


def test_a_guide_that_is_missing_runs_nothing(folder):
    (folder / "launch" / "README.md").unlink()
    done = start(folder, "```bash\necho first >> log\n```\n")
    assert done.returncode != 0
    assert done.stderr == "launch/README.md is missing\n"
    assert not (folder / "log").exists()


def test_the_environment_is_active_and_nothing_is_typed(folder):
    done = start(
        folder,
        "`source .venv/bin/activate`\n\n```bash\n"
        "python -c \"import os; print(os.environ['VIRTUAL_ENV'])\"\nwhich python\nwc -c\n```\n",
    )
    assert done.returncode == 0, done.stderr
    assert f"\n{folder}/.venv\n" in done.stdout
    assert f"\n{folder}/.venv/bin/python\n" in done.stdout
    assert "+ wc -c\n0\n" in done.stdout


@pytest.mark.parametrize(
    "failing",
    ["false", "exit 3", "false | true", "echo $NO_SUCH_VARIABLE", "no_such_program", "cat 'no such file' \\\n  x"],
)
def test_a_failure_ends_it_and_is_named(folder, failing):
    done = start(folder, f"```bash\necho before >> log\n{failing}\necho after >> log\n```\n```python\nprint(1)\n```\n")
    assert done.returncode != 0
    assert written(folder) == ["before"]
    assert re.search(rf"^README.md line 3 failed with exit \d+: {re.escape(failing)}$", done.stderr, re.MULTILINE)
    assert "print(1)" not in done.stdout


def test_a_signal_is_told_as_a_shell_tells_it(folder):
    done = start(folder, "```bash\nkill -TERM $$\n```\n")
    assert done.returncode != 0
    assert "README.md line 2 failed with exit 143: kill -TERM $$" in done.stderr


def test_a_python_block_that_fails_ends_it(folder):
    done = start(folder, "```python\nraise ValueError('no')\n```\n\n```bash\necho after >> log\n```\n")
    assert done.returncode != 0
    assert "README.md line 2 failed with exit 1: raise ValueError('no')" in done.stderr
    assert not (folder / "log").exists()


def test_without_an_environment_a_python_block_cannot_run(folder):
    shutil.rmtree(folder / ".venv")
    done = start(folder, "```python\nprint(1)\n```\n")
    assert done.returncode != 0
    assert "README.md line 2 cannot run" in done.stderr


def test_a_marked_block_is_not_run(folder):
    readme = (
        "<!-- not run in CI: needs a TPU -->\n```bash\necho marked >> log\necho too >> log\n```\n"
        "<!-- not run in CI: needs a key -->\n```python\nopen('log', 'a').write('marked ')\n```\n"
        "<!-- another comment -->\n```bash\necho run >> log\n```\n"
    )
    done = start(folder, readme)
    assert done.returncode == 0, done.stderr
    assert written(folder) == ["run"]
    assert "- not run (needs a TPU): echo marked >> log\n- not run (needs a TPU): echo too >> log\n" in done.stdout
    assert "- not run (needs a key): open(" in done.stdout


COUNTING = """
trap '{trap}' INT
step=$(cat at 2> /dev/null || echo 0)
echo "from step $step"
for i in $(seq 400); do
  step=$((step + 1)); echo $step > at; echo "step $step"
  sleep 0.05
done
"""


@pytest.mark.parametrize(
    ("trap", "second", "fault"),
    [
        ("exit 130", r"from step [1-9].*step \d", ""),
        ("exit 0", "step 4", "README.md line 3 ended with exit 0, not 130 by Ctrl-C: bash count"),
        ("exit 130", "from step 0.*step 4", "README.md line 3 ended with exit 0 and never printed"),
    ],
)
def test_a_long_command_is_interrupted_and_started_again(folder, trap, second, fault):
    steps = "exit 0" if "step 0" in second else ":"
    (folder / "count").write_text(COUNTING.format(trap=trap).replace("sleep", f"[ $step -lt 6 ] || {steps}; sleep"))
    done = start(
        folder, f"<!-- interrupted in CI at: step 3; {second} -->\n```bash\nbash count\n```\n```bash\necho after\n```\n"
    )
    assert (done.returncode != 0, "+ echo after" in done.stdout) == (bool(fault), not fault), done.stderr
    assert fault in done.stderr
    assert done.stdout.startswith("+ bash count\nfrom step 0\nstep 1\nstep 2\nstep 3\n(Ctrl-C)\n")
    if not fault:
        assert re.search(r"\(exit 130 after \d s\)\n\+ bash count\nfrom step [3-9]\nstep \d+\n\(Ctrl-C\)", done.stdout)


def test_a_list_runs_nothing(folder):
    done = start(folder, "```bash\necho a >> log\n```\n<!-- not run in CI: b -->\n```bash\necho c\n```\n", "--list")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "+ echo a >> log\n- not run (b): echo c\n"
    assert not (folder / "log").exists()


@pytest.mark.parametrize(
    ("readme", "fault"),
    [
        ("<!-- not run in CI: x -->\n\n```bash\necho a >> log\n```\n", "README.md line 1: no block of bash or python"),
        ("```bash\necho a >> log\n", "README.md line 1: the block has no end"),
    ],
)
def test_a_readme_that_is_not_understood_runs_nothing(folder, readme, fault):
    done = start(folder, readme)
    assert done.returncode != 0
    assert fault in done.stderr
    assert not (folder / "log").exists()


def listed() -> list[str]:
    command = [sys.executable, str(RUNNER), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.split(r"\n(?=[+-] )", done.stdout.rstrip("\n"))


def test_every_block_runs_or_says_why_not():
    """Commands that need a cloud, a TPU, a download or a reader's own files are marked. All others are run."""
    lines = listed()
    elsewhere = re.compile(
        r"gs://|gcloud|hf download|meta-llama/|Xkev/|\b(BUCKET|PROJECT|ZONE|SRC|DIR_OR_HUB_ID)\b|photo\.jpg"
    )
    for line in lines:
        if line.startswith("+ "):
            assert not elsewhere.search(line), line
        else:
            assert re.match(r"- not run \(\S.*\): \S", line)
    documents = "\n".join((ROOT / folder / "README.md").read_text() for folder in (".", *GUIDES))
    blocks = re.findall(r"^```bash\n(.*?)^```", documents, re.DOTALL | re.MULTILINE)
    typed = [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]
    assert [line for line in typed if line not in "\n".join(lines)] == []


def test_the_first_command_sets_up_and_one_more_runs_the_tests():
    runs = [line for line in listed() if line.startswith("+ ")]
    assert runs[0].startswith("+ python3 -m venv .venv && .venv/bin/pip install ")
    assert len([line for line in runs if re.search(r"-m pytest( |$)", line)]) == 1


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("echo fine > ignored", 0, "+ .venv/bin/mypy"),
        ("echo left > 'left over'", 1, '?? "left over"'),
        ("false", 1, "README.md line 3 failed with exit 1: false"),
    ],
)
def test_ci_runs_the_readme_then_lint_and_types(folder, command, code, said):
    """It makes the environment anew; what the commands leave behind must be ignored by git."""
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    (folder / ".venv" / "old").touch()
    (folder / ".gitignore").write_text(".venv/\nignored\n")
    tools = "cp /bin/true .venv/bin/ruff && cp /bin/true .venv/bin/mypy"
    readme = f"```bash\npython3 -m venv --without-pip .venv && {tools} && test ! -e .venv/old\n{command}\n```\n"
    (folder / "README.md").write_text(readme)
    for git in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "all"]):
        subprocess.run(["git", *git], cwd=folder, check=True)
    done = subprocess.run([folder / ".ci" / "run"], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert said in done.stderr.splitlines()
