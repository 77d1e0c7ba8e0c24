"""Failures of an endpoint, the bounds on what it is asked, and the key."""

import re

import pytest

from llava_cot_jax import annotate
from llava_cot_jax.errors import TransientError, UserError
from tests.annotation.runs import KEY, by_question, lines, rows_of, run, write_input
from tests.annotation.stand_in_endpoint import Asked, Response, running, staged, well
from tests.processes import ROOT


def test_failures_of_the_endpoint_are_counted_and_mended(tmp_path, stand_in, capsys):
    rows = rows_of(8)
    troubles = [
        Response("slow down", status=429, headers={"Retry-After": "0.3"}),
        Response("broken", status=500),
        Response("gone", status=503),
        Response(staged("thing 3"), breaks=True),
        Response(staged("thing 4"), cut=True),
        Response(staged("thing 5"), late=3),
        Response("not now", status=429, headers={"retry-after-ms": "20"}),
    ]
    questions = [row["question"] for row in rows]
    stand_in.behave = by_question({q: [trouble] for q, trouble in zip(questions, troubles, strict=False)})
    run(tmp_path, rows, stand_in, "--timeout", "1.5", "--requests_in_flight", "8")
    answers = [row["conversations"][1]["value"] for row in lines(tmp_path / "out.jsonl")]
    assert answers == [staged(f"thing {i}") for i in range(8)]
    out = capsys.readouterr().out
    assert sorted(re.search("requests that failed: (.*)", out)[1].split(", ")) == [
        "broken connection 1",
        "no reply in time 1",
        "status 429 2",
        "status 500 1",
        "status 503 1",
        "unreadable reply 1",
    ]
    first, second = [asked.time for asked in stand_in.asked if asked.question == questions[0]]
    assert second - first >= 0.3
    assert len(stand_in.asked) == 8 + 7


def test_requests_that_are_too_many_stand_in_a_queue(tmp_path, stand_in):
    """Two of three requests are refused. However often one is, it is sent again as long as others come through."""
    refused = Response("too many", status=429, headers={"retry-after-ms": "5"})
    stand_in.behave = lambda asked: refused if asked.number % 3 else well(asked)
    run(tmp_path, rows_of(30), stand_in, "--max_retries", "2", "--requests_in_flight", "8")
    assert len(lines(tmp_path / "out.jsonl")) == 30
    assert 88 <= len(stand_in.asked) <= 90


def test_a_delay_that_is_too_long_to_wait_for_ends_the_run(tmp_path, stand_in, capsys):
    rows = rows_of(3)
    tomorrow = {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}
    stand_in.behave = by_question({rows[1]["question"]: [Response("used up", status=429, headers=tomorrow)]})
    run(tmp_path, rows, stand_in, "--requests_in_flight", "1")
    assert "2 of 3 rows are not finished (the endpoint asks to wait for" in capsys.readouterr().err
    run(tmp_path, rows, stand_in)
    assert len(lines(tmp_path / "out.jsonl")) == 3 and len(stand_in.asked) == 4


def test_a_request_that_always_fails_is_left_for_the_next_run(tmp_path, stand_in, capsys):
    rows = rows_of(3)
    stand_in.behave = by_question({rows[1]["question"]: [Response("broken", status=500)] * 3})
    run(tmp_path, rows, stand_in, "--max_retries", "2", "--requests_in_flight", "3")
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 2]
    assert not lines(tmp_path / "out.rejected.jsonl")
    assert "1 of 3 rows are not finished (1 by status 500)" in capsys.readouterr().err
    asked = len(stand_in.asked)
    run(tmp_path, rows, stand_in)
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 1, 2]
    assert len(stand_in.asked) == asked + 1


REFUSED = {
    401: r"does not accept the key \(status 401\): check the environment",
    403: r"answers with status 403: no access with \[key\]",
    404: "answers with status 404: no access",
    400: "4 requests in a row were refused; of the last one, the endpoint refuses it with status 400: no access",
}


@pytest.mark.parametrize("status", REFUSED)
def test_what_no_other_try_can_mend_ends_the_command(tmp_path, stand_in, status):
    stand_in.behave = lambda asked: Response(f"no access with {KEY}", status=status)
    with pytest.raises(UserError, match=REFUSED[status]) as ended:
        run(tmp_path, rows_of(8), stand_in, "--requests_in_flight", "1")
    assert KEY not in str(ended.value)
    assert len(stand_in.asked) == (4 if status == 400 else 1)


def test_an_endpoint_that_is_not_there(tmp_path):
    options = [*write_input(tmp_path, rows_of(1)), "--model=x", "--base_url=http://127.0.0.1:9/v1", "--max_retries=1"]
    with pytest.raises(TransientError, match=r"127\.0\.0\.1:9/v1/ answers nothing"):
        annotate.main(options)


def test_a_refused_request_is_rejected_with_the_reason(tmp_path, stand_in):
    rows = rows_of(2)
    stand_in.behave = by_question({rows[0]["question"]: [Response("against the policy", status=400)]})
    run(tmp_path, rows, stand_in, "--requests_in_flight", "1")
    (rejected,) = lines(tmp_path / "out.rejected.jsonl")
    assert (rejected["id"], rejected["reason"]) == (0, "refused request")
    assert rejected["detail"] == "the endpoint refuses it with status 400: against the policy"


def test_the_number_of_requests_is_bounded_over_all_runs(tmp_path, stand_in, capsys):
    rows = rows_of(6)
    run(tmp_path, rows, stand_in, "--max_requests", "4", "--requests_in_flight", "3")
    assert len(stand_in.asked) == 4 and len(lines(tmp_path / "out.jsonl")) == 4
    assert "2 of 6 rows are not finished (--max_requests 4 is reached)" in capsys.readouterr().err
    run(tmp_path, rows, stand_in, "--max_requests", "4")
    assert len(stand_in.asked) == 4
    run(tmp_path, rows, stand_in, "--max_requests", "6")
    assert len(stand_in.asked) == 6 and len(lines(tmp_path / "out.jsonl")) == 6
    run(tmp_path, rows, stand_in)
    assert len(stand_in.asked) == len({asked.digest for asked in stand_in.asked}) == 6


def test_the_cost_is_bounded(tmp_path, stand_in, capsys):
    """A reply costs 1000 tokens in and 200 out: 0.0014. One in flight may cost up to some 0.002 + 300 tokens out."""
    prices = ["--price.input", "1", "--price.output", "2", "--max_new_tokens", "300"]
    run(tmp_path, rows_of(9), stand_in, *prices, "--max_cost", "0.01", "--requests_in_flight", "9")
    out, err = capsys.readouterr()
    spent = float(re.search(r"out: [\d,]+, cost ([\d.]+)", out)[1])
    assert spent == pytest.approx(0.0014 * len(stand_in.asked), rel=1e-3)
    assert 0.01 - 0.0028 <= spent <= 0.01
    assert "which cost about" in out and "rows are not finished (--max_cost 0.01 leaves no room" in err
    stand_in.behave = lambda asked: Response(staged(asked.standard_answer), usage=False)
    asked = len(stand_in.asked)
    run(tmp_path, rows_of(9), stand_in, *prices, "--max_cost", "0.013")
    assert len(stand_in.asked) == asked + 2  # each of which is taken to cost as much as it may
    with pytest.raises(UserError, match=r"a cost needs --price\.input and --price\.output"):
        run(tmp_path, rows_of(9), stand_in, "--max_cost", "1")


def test_requests_are_bounded_in_flight_and_per_minute(tmp_path, stand_in):
    stand_in.behave = lambda asked: Response(staged(asked.standard_answer), late=0.05)
    run(tmp_path, rows_of(12), stand_in, "--requests_in_flight", "3")
    assert 2 <= stand_in.most <= 3
    (tmp_path / "paced").mkdir()
    stand_in.asked.clear()
    run(tmp_path / "paced", rows_of(6), stand_in, "--requests_per_minute", "1200")
    times = [asked.time for asked in stand_in.asked]
    assert times[-1] - times[0] >= 0.9 * 5 * 60 / 1200  # the first comes some milliseconds late


def test_settings_of_replies_are_sent_and_other_ones_ask_anew(tmp_path, stand_in):
    run(tmp_path, rows_of(1), stand_in)
    run(tmp_path, rows_of(1), stand_in, "--temperature", "0.5", "--max_new_tokens", "77")
    first, second = (asked.body for asked in stand_in.asked)
    assert "temperature" not in first and first["max_completion_tokens"] == 2048
    assert (second["temperature"], second["max_completion_tokens"]) == (0.5, 77)
    (tmp_path / "older").mkdir()
    run(tmp_path / "older", rows_of(1), stand_in, "--length_parameter", "max_tokens", "--max_new_tokens", "77")
    older = stand_in.asked[-1].body
    assert older["max_tokens"] == 77 and "max_completion_tokens" not in older
    prompts = (ROOT / "llava_cot_jax/annotation/prompts.yaml").read_text().replace("You write worked", "Write worked")
    (tmp_path / "mine.yaml").write_text(prompts)
    run(tmp_path, rows_of(1), stand_in, "--prompts", str(tmp_path / "mine.yaml"))
    assert stand_in.asked[-1].body["messages"][0]["content"].startswith("Write worked answers")


def test_the_key_is_sent_and_nowhere_else(tmp_path, monkeypatch, capsys):
    def behave(asked: Asked) -> Response:
        if asked.question == "Which is q1?":
            return Response(f"bad request of {KEY}", status=400)
        return Response(staged(f"{asked.standard_answer}", CAPTION=f"it says {KEY}" if asked.attempt == 1 else "it"))

    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY")
    with running(behave) as stand_in:
        run(tmp_path, rows_of(3), stand_in, "--key_variable", "MY_KEY")
        assert stand_in.keys == {f"Bearer {KEY}"}
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert KEY.encode() not in written and b"[key]" in written
        assert KEY not in "".join(capsys.readouterr())
        stand_in.keys.clear()
        run(tmp_path, rows_of(4), stand_in)  # an endpoint that is named needs no key
        assert stand_in.keys == {"Bearer none"}
