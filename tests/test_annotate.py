"""The command that makes training data: its arguments, and its ends by signals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from llava_cot_jax import annotate, prepare
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.data.sources import open_rows
from llava_cot_jax.errors import UserError
from tests.annotation.runs import BAD, lines, rows_of, run, write_input, write_world
from tests.annotation.stand_in_endpoint import Asked, Response, StandIn, running, well
from tests.processes import ROOT
from tests.serving.servers import KEY, serving
from tests.tiers import in_tiers


def test_wrong_arguments(tmp_path, monkeypatch):
    def refuses(message: str, rows: list[dict[str, Any]], *options: str) -> None:
        given = write_input(tmp_path, rows)
        with pytest.raises(UserError, match=message):
            annotate.main([*given, "--model=x", "--base_url=http://localhost:1/v1", *options])

    good = rows_of(1)
    refuses("base_url has a name, a password, a query", good, "--base_url=http://me:sk-1@localhost/v1")
    refuses("base_url is no URL of an endpoint", good, "--base_url=localhost:8000")
    refuses("--seed has a meaning only with --model self", good, "--seed=3")
    refuses("--checkpoint has a meaning only with --model self", good, "--checkpoint=shapes")
    refuses("--judge_prompts has a meaning only with --model self", good, "--judge_prompts=no.yaml")
    refuses(
        "--max_requests has no meaning with --model self", good, "--base_url=null", "--model=self", "--max_requests=3"
    )
    refuses("tries is 0; it must be at least 1", good, "--tries=0")
    refuses("timeout is 0; it must be more than 0", good, "--timeout=0")
    refuses("questions.jsonl would overwrite the file of the questions", good, f"--output={tmp_path}/questions.jsonl")
    refuses("its name must end in .jsonl", good, f"--output={tmp_path}/out")
    refuses("a cost needs --price.input and --price.output", good, "--price.input=1")
    refuses(r"line 1: it has the key 'answr'", [good[0] | {"answr": 1}])
    refuses(r"line 2 has the id 0 of an earlier line", [*good, *good])
    refuses(r"line 1: a question has no standard answer", [{"id": 1, "question": "q?"}])
    refuses(r"line 1: it has 2 questions, 1 answers and 2 hints", [{"id": 1, "questions": ["a", "b"], "answers": [1]}])
    refuses(r"line 1: a question spells the control token", [good[0] | {"question": "<|eot_id|>?"}])
    refuses("no row has its image in", [good[0] | {"image": "b.png"}])
    (tmp_path / "prompts.yaml").write_text("ask: hello\n")
    refuses("prompts.yaml: system is None", good, f"--prompts={tmp_path}/prompts.yaml")
    (tmp_path / "other.jsonl").write_text("{}\n")
    refuses("other.jsonl exists, but other.journal.jsonl", good, f"--output={tmp_path}/other.jsonl")
    (tmp_path / "bad.journal.jsonl").write_text("{}\n")
    refuses("bad.journal.jsonl, line 1 is no reply of this command", good, f"--output={tmp_path}/bad.jsonl")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    refuses("the environment variable OPENAI_API_KEY has no key", good, "--base_url=null")


def test_without_the_openai_package(tmp_path):
    """The package is missed before any file is looked for."""
    code = "import sys; sys.modules['openai'] = None; from llava_cot_jax import annotate, cli; cli.run(annotate.main)"
    options = ["--input=no.jsonl", "--images=no", "--output=out.jsonl", "--model=gpt-4o"]
    ended = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "error: an endpoint is asked through the package openai: pip install 'llava-cot-jax[annotate]'\n"
    )


def command(folder: Path, rows: list[dict[str, Any]], stand_in: StandIn, *options: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    given = [*write_input(folder, rows), "--model", "stand-in", "--base_url", stand_in.url, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "llava_cot_jax.annotate", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_our_own_server_is_asked(tmp_path, monkeypatch):
    """It serves the small model, which is asked with little more than the questions that it knows."""
    texts = {"system": "?", "ask": "{question}{hint} {answer}", "hint": " {text}", "retry": "{problem}"}
    texts |= {"check": "{question} {answer} {conclusion}"}
    prompts = {**texts, "verdicts": {"same": "yes", "different": "no", "refusal": "refusal"}}
    (tmp_path / "prompts.yaml").write_text(json.dumps(prompts))
    options = [*write_world(tmp_path, 8), f"--output={tmp_path}/out.jsonl", f"--prompts={tmp_path}/prompts.yaml"]
    with serving("--max_new_tokens", "160") as served:
        served.wait_for("serving")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        annotate.main([*options, "--model=shapes", f"--base_url={served.url}", "--tries=1"])
        assert served.stop() == 0
    kept, rejected = lines(tmp_path / "out.jsonl"), lines(tmp_path / "out.rejected.jsonl")
    told = {(row["id"], turn["value"]) for row in kept for turn in row["conversations"][::2]}
    told |= {(row["id"], row["question"]) for row in rejected}
    asked = {(row["id"], question) for row in lines(tmp_path / "questions.jsonl") for question in row["questions"]}
    assert told == asked and "refused request" not in {row["reason"] for row in rejected}
    world = ShapesRows("train", seed=1, size=32)
    own = {turn.answer for row in kept for turn in world[row["id"]].turns}
    assert sum(turn["value"] in own for row in kept for turn in row["conversations"]) >= 2  # it saw the pictures
    given = [f"--annotations={tmp_path}/out.jsonl", f"--images={tmp_path}", f"--output={tmp_path}/data", "--workers=0"]
    prepare.main([*given, "--validation_share=0"])
    assert len(open_rows(f"{tmp_path}/data", "train")) == len(kept)


@pytest.mark.parametrize("times", in_tiers([3, 10], suite=[3]))
def test_killed_several_times_and_nothing_is_asked_twice(tmp_path, times):
    rows = rows_of(60)
    bad = {row["question"]: [list(BAD.values())[i % len(BAD)]] for i, row in enumerate(rows[::4])}

    def behave(asked: Asked) -> Response:
        """A response that depends on the request alone, so that it is the same after a restart."""
        if asked.is_check or asked.attempt > 1 or asked.question not in bad:
            return well(asked)
        return bad[asked.question][0]

    (tmp_path / "whole").mkdir()
    with running(behave) as stand_in:
        run(tmp_path / "whole", rows, stand_in)
    draw = random.Random(0)
    phases = cycle(["before", "half", "after"])
    processes: list[subprocess.Popen[str]] = []
    again: list[Asked] = []
    finished: set[str] = set()  # requests whose replies were in the journal when the command was killed
    with running() as stand_in:

        def kill() -> None:
            processes[-1].send_signal(signal.SIGKILL)
            processes[-1].wait()

        def behave_until_killed(asked: Asked) -> Response:
            if asked.digest in finished:
                again.append(asked)
            response = behave(asked)
            if asked.number != last:
                return response
            return Response(response.text, response.finish, refusal=response.refusal, **{next(phases): kill})

        stand_in.behave = behave_until_killed
        for kills in range(times + 1):
            last = len(stand_in.asked) + draw.randint(1, 7) if kills < times else -1
            processes.append(command(tmp_path, rows, stand_in, "--requests_in_flight", "4"))
            _, err = processes[-1].communicate(timeout=120)
            assert processes[-1].returncode == (-signal.SIGKILL if kills < times else 0), err
            kept = [line for line in (tmp_path / "out.journal.jsonl").read_text().split("\n")[:-1]]
            numbers = [int(json.loads(line)["reply"]["completion"].removeprefix("completion-")) for line in kept]
            finished |= {stand_in.asked[number - 1].digest for number in numbers}
            assert len(set(numbers)) == len(numbers)
        digests = [asked.digest for asked in stand_in.asked]
    for name in ("out.jsonl", "out.rejected.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not again and set(digests) == finished
    assert len(digests) - len(finished) <= times * 4  # those in flight when it was killed


@pytest.mark.slow
def test_ctrl_c_keeps_the_replies_in_flight(tmp_path):
    rows = rows_of(12)
    processes: list[subprocess.Popen[str]] = []

    def behave(asked: Asked) -> Response:
        if asked.number == 5:
            processes[-1].send_signal(signal.SIGINT)
        return Response(well(asked).text, late=0.3 if asked.number >= 4 else 0)

    with running(behave) as stand_in:
        processes.append(command(tmp_path, rows, stand_in, "--requests_in_flight", "3"))
        _, err = processes[-1].communicate(timeout=60)
        journal = tmp_path / "out.journal.jsonl"
        assert processes[-1].returncode == 130
        assert err.splitlines()[-2:] == [
            f"all replies so far are in {journal}: the same command goes on",
            "interrupted",
        ]
        assert len(lines(journal)) == len(stand_in.asked) < 12
        run(tmp_path, rows, stand_in)
        assert len(stand_in.asked) == len({asked.digest for asked in stand_in.asked}) == 12
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == list(range(12))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    with running(lambda asked: Response(late=20)) as stand_in:
        process = command(tmp_path, rows_of(4), stand_in, "--requests_in_flight", "2")
        while not stand_in.asked:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "the replies to those in flight are awaited" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=15)
        assert process.returncode == 130 and err.splitlines()[-1] == "interrupted"


def test_a_torn_line_of_the_journal_is_asked_again_and_two_commands_do_not_share_one(tmp_path):
    with running() as stand_in:
        run(tmp_path, rows_of(3), stand_in)
        whole = (tmp_path / "out.jsonl").read_bytes()
        journal = tmp_path / "out.journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-9])
        run(tmp_path, rows_of(3), stand_in)
        assert (tmp_path / "out.jsonl").read_bytes() == whole and len(stand_in.asked) == 4

        def behave(asked: Asked) -> Response:
            ended = subprocess.run(
                [sys.executable, "-m", "llava_cot_jax.annotate", *options], capture_output=True, text=True, cwd=ROOT
            )
            assert ended.returncode == 2 and "is being written by another process" in ended.stderr
            return well(asked)

        options = [*write_input(tmp_path, rows_of(4)), "--model", "stand-in", "--base_url", stand_in.url]
        stand_in.behave = behave
        run(tmp_path, rows_of(4), stand_in)
        assert len(lines(tmp_path / "out.jsonl")) == 4
