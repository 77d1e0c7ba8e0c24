"""Runs that go on although an endpoint refuses some rows, is slow, or counts more than was estimated."""

import json
import re
import threading

import pytest

from llava_cot_jax import annotate
from llava_cot_jax.annotation import endpoint
from llava_cot_jax.errors import UserError
from tests.annotation.runs import by_question, lines, rows_of, run, write_world
from tests.annotation.stand_in_endpoint import Asked, Response, staged

ONE = ("--requests_in_flight", "1")


def refusing(numbers: set[int]):
    """Behaviour of an endpoint that refuses the rows of these numbers, always and at once, and answers later."""
    refused = {f"Which is q{number}?" for number in numbers}
    return lambda asked: (
        Response("against the policy", status=400)
        if asked.question in refused
        else Response(staged(asked.standard_answer), late=0.05)
    )


@pytest.mark.parametrize("in_flight", ["1", "8"])
def test_rows_that_are_always_refused_end_no_run_and_block_no_others(tmp_path, stand_in, in_flight):
    """Neither their number nor a second run makes a difference, and both runs name all of them."""
    refused = {2, 6, 10, 14, 18}
    stand_in.behave = refusing(refused)
    for count in (20, 20, 30):
        run(tmp_path, rows_of(count), stand_in, "--requests_in_flight", in_flight)
        assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [i for i in range(count) if i not in refused]
        assert {row["id"] for row in lines(tmp_path / "out.rejected.jsonl")} == refused
    assert len(stand_in.asked) == 30 + 2 * len(refused)


def test_refusals_that_come_sooner_than_replies_are_not_in_a_row(tmp_path, stand_in):
    refused = set(range(0, 100, 10))
    stand_in.behave = refusing(refused)
    run(tmp_path, rows_of(100), stand_in, "--requests_in_flight", "64")
    assert len(lines(tmp_path / "out.jsonl")) == 90 and len(lines(tmp_path / "out.rejected.jsonl")) == 10


def test_a_first_row_that_always_fails_ends_no_run(tmp_path, stand_in):
    rows = rows_of(3)
    stand_in.behave = by_question({rows[0]["question"]: [Response("broken", status=500)] * 9})
    run(tmp_path, rows, stand_in, *ONE, "--max_retries", "1")
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [1, 2]


def test_replies_that_take_longer_than_the_delay_that_is_asked_for_are_awaited(tmp_path, stand_in, monkeypatch):
    """The endpoint takes two requests at a time, answers after two seconds, and names a delay of a twentieth."""
    monkeypatch.setattr(endpoint, "_FIRST_DELAY", 0.1)
    places = threading.Semaphore(2)

    def behave(asked: Asked) -> Response:
        if not places.acquire(blocking=False):
            return Response("too many", status=429, headers={"retry-after-ms": "50"})
        return Response(staged(asked.standard_answer), late=2.0, after=places.release)

    stand_in.behave = behave
    run(tmp_path, rows_of(6), stand_in, "--requests_in_flight", "4")
    assert len(lines(tmp_path / "out.jsonl")) == 6


def test_the_cost_is_bounded_where_an_endpoint_counts_more_than_was_estimated(tmp_path, stand_in, capsys):
    """Each reply costs 0.0252 by what the endpoint counts, 25 times the estimate."""
    usage = {"prompt_tokens": 25_000, "completion_tokens": 100}
    stand_in.behave = lambda asked: Response(staged(asked.standard_answer), late=0.05, usage=usage)
    prices = ("--price.input", "1", "--price.output", "2", "--max_new_tokens", "300")
    run(tmp_path, rows_of(30), stand_in, *prices, "--max_cost", "0.2", "--requests_in_flight", "16")
    spent = float(re.search(r"out: [\d,]+, cost ([\d.]+)", capsys.readouterr().out)[1])
    assert 0.2 - 0.0504 <= spent <= 0.2 and spent == pytest.approx(0.0252 * len(stand_in.asked), rel=1e-3)


@pytest.mark.parametrize("finish", ["error", "abort"])
def test_a_reply_that_a_gateway_broke_off_is_asked_for_again(tmp_path, stand_in, capsys, finish):
    broken = Response("<SUMMARY> I", finish=finish)
    stand_in.behave = by_question({"Which is q0?": [broken] * 2})
    run(tmp_path, rows_of(1), stand_in, "--tries", "1")
    assert "unreadable reply 2" in capsys.readouterr().out and len(lines(tmp_path / "out.jsonl")) == 1


def test_an_error_while_the_model_samples_leaves_what_is_finished(tmp_path, monkeypatch):
    (tmp_path / "world").mkdir()
    given = [*write_world(tmp_path / "world", 3), "--model=self", f"--output={tmp_path}/out.jsonl"]
    world = {row["id"]: row for row in lines(tmp_path / "world" / "questions.jsonl")}

    def sample_one_and_fail(options, model, job, images, shown) -> None:
        request = next(job.outcomes())[1]
        text = staged(str(world[request.row.id]["answers"][0]))
        job.journal.add(request, {"candidates": [{"text": text, "score": 0.5, "mean_log_prob": -1.0}]})
        raise UserError("the memory is exhausted")

    monkeypatch.setattr(annotate, "_run_sampler", sample_one_and_fail)
    with pytest.raises(UserError, match="the memory is exhausted"):
        annotate.main(given)
    (row,) = lines(tmp_path / "out.jsonl")
    assert json.dumps(row["conversations"][0]["value"]) == json.dumps(world[row["id"]]["questions"][0])


def spent_of(capsys) -> float:
    return float(re.search(r"out: [\d,]+, cost ([\d.]+)", capsys.readouterr().out)[1])


@pytest.mark.parametrize("first", ["row without an image", "check"])
def test_the_cost_is_bounded_where_the_first_request_has_no_image(tmp_path, stand_in, capsys, first):
    """What text takes says nothing about what images take."""
    prices = ("--price.input", "1", "--price.output", "2", "--max_new_tokens", "300", "--max_cost", "0.2")

    def behave(asked: Asked) -> Response:
        has_image = any(isinstance(message["content"], list) for message in asked.body["messages"])
        usage = {"prompt_tokens": 25_000 if has_image else 200, "completion_tokens": 100}
        if asked.is_check:
            return Response("yes", usage=usage)
        conclusion = "the thing" if asked.question == "Which is q0?" else asked.standard_answer
        return Response(staged(conclusion), late=0.05, usage=usage)

    rows = rows_of(30)
    stand_in.behave = behave
    if first == "check":  # a run ended between the answer and its check
        run(tmp_path, rows[:1], stand_in, *prices, "--max_requests", "1")
        capsys.readouterr()
    else:
        rows[0]["image"] = None
    run(tmp_path, rows, stand_in, *prices, "--requests_in_flight", "16")
    assert 0.1 < spent_of(capsys) <= 0.2


def test_a_request_that_fails_is_booked_as_the_endpoint_counts(tmp_path, stand_in):
    """The first reply says 25,000 tokens, and the next request may have taken as many."""
    usage = {"prompt_tokens": 25_000, "completion_tokens": 100}
    stand_in.behave = by_question(
        {"Which is q0?": [Response(staged("thing 0"), usage=usage)], "Which is q1?": [Response("x", breaks=True)]}
    )
    run(tmp_path, rows_of(2), stand_in, *ONE)
    booked = [line["reply"]["input_tokens"] for line in lines(tmp_path / "out.journal.jsonl")]
    assert booked[0] == 25_000 and booked[1] >= 25_000


def test_half_of_a_character_in_a_verdict_ends_no_run(tmp_path, stand_in):
    rows = rows_of(2)
    wrong, verdict = Response(staged("another thing")), Response("No, it is \ud83d")

    def behave(asked: Asked) -> Response:
        if asked.question != "Which is q0?":
            return Response(staged(asked.standard_answer))
        return verdict if asked.is_check else wrong

    stand_in.behave = behave
    for _ in range(2):
        run(tmp_path, rows, stand_in, "--tries", "2")
        assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [1]
    (rejected,) = lines(tmp_path / "out.rejected.jsonl")
    assert rejected["id"] == 0 and "(it is" in rejected["detail"]
