"""What ends a run, is left for the next one, and is counted, where an endpoint does not answer as it should."""

import json
import time

import pytest
from PIL import Image

from llava_cot_jax import annotate
from llava_cot_jax.errors import TransientError, UserError
from tests.annotation.runs import KEY, by_question, lines, rows_of, run, write_input
from tests.annotation.stand_in_endpoint import Asked, Response, staged, well

ONE = ("--requests_in_flight", "1")
PRICES = ("--price.input", "1", "--price.output", "2", "--max_new_tokens", "300")


def test_a_refusal_is_asked_again_by_the_next_run(tmp_path, stand_in):
    rows = rows_of(3)
    stand_in.behave = by_question({rows[1]["question"]: [Response("not now", status=400)]})
    run(tmp_path, rows, stand_in, *ONE)
    assert [row["id"] for row in lines(tmp_path / "out.rejected.jsonl")] == [1]
    run(tmp_path, rows, stand_in)
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 1, 2] and len(stand_in.asked) == 4
    assert not lines(tmp_path / "out.rejected.jsonl")


def test_refusals_in_a_row_end_the_run_and_reject_nothing(tmp_path, stand_in):
    """As where the credit is used up: the rows that were answered are in the output, and all others are left."""
    stand_in.behave = lambda asked: well(asked) if asked.number <= 2 else Response("no credit", status=400)
    with pytest.raises(UserError, match=r"4 requests in a row were refused; of the last one, .*: no credit"):
        run(tmp_path, rows_of(20), stand_in, *ONE)
    assert len(lines(tmp_path / "out.jsonl")) == 2 and len(stand_in.asked) == 6
    assert not lines(tmp_path / "out.rejected.jsonl")
    stand_in.behave = well
    run(tmp_path, rows_of(20), stand_in)
    assert len(lines(tmp_path / "out.jsonl")) == 20


@pytest.mark.parametrize("status", [403, 404, 500])
def test_one_row_that_always_fails_ends_no_run(tmp_path, stand_in, status):
    """Neither one request at a time nor a run of that row alone makes a difference."""
    rows = rows_of(3)
    stand_in.behave = by_question({rows[1]["question"]: [Response("broken", status=status)] * 9})
    for _ in range(2):
        run(tmp_path, rows, stand_in, *ONE, "--max_retries", "1")
        assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 2]


def test_an_endpoint_that_dies_ends_the_run(tmp_path, stand_in):
    stand_in.behave = lambda asked: well(asked) if asked.number == 1 else Response("broken", status=500)
    with pytest.raises(TransientError, match="4 requests in a row failed; the last one by status 500"):
        run(tmp_path, rows_of(9), stand_in, *ONE, "--max_retries", "0")
    assert len(lines(tmp_path / "out.jsonl")) == 1 and len(stand_in.asked) == 5


def test_a_fatal_answer_keeps_the_replies_in_flight(tmp_path, stand_in):
    rows = rows_of(6)

    def behave(asked: Asked) -> Response:
        if asked.question == rows[0]["question"]:
            return Response("who are you", status=401)
        return Response(well(asked).text, late=0.3)

    stand_in.behave = behave
    with pytest.raises(UserError, match="does not accept the key"):
        run(tmp_path, rows, stand_in, "--requests_in_flight", "3")
    assert len(stand_in.asked) == len(lines(tmp_path / "out.journal.jsonl")) == 3
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [1, 2]


def test_a_reply_that_trickles_is_given_up(tmp_path, stand_in):
    """Each part comes in time, and the whole does not."""
    slow = Response(staged("thing 0"), trickle=0.1)
    stand_in.behave = by_question({"Which is q0?": [slow]})
    began = time.monotonic()
    run(tmp_path, rows_of(1), stand_in, "--timeout", "0.5")
    assert len(stand_in.asked) == 2 and time.monotonic() - began < 5
    assert len(lines(tmp_path / "out.jsonl")) == 1


def test_failures_count_and_cost_over_all_runs(tmp_path, stand_in, capsys):
    """A request that is answered too late, or half, may be billed as one of full length."""
    late, half = Response(staged("x"), late=1.5), Response(staged("x"), breaks=True)
    stand_in.behave = by_question({"Which is q0?": [late, half, Response("busy", status=500)]})
    run(tmp_path, rows_of(1), stand_in, *PRICES, "--timeout", "0.5", "--max_requests", "3")
    assert len(stand_in.asked) == 3 and not lines(tmp_path / "out.jsonl")
    booked = [line["reply"] for line in lines(tmp_path / "out.journal.jsonl")]
    assert [each.get("output_tokens") for each in booked] == [300, 300, None]
    run(tmp_path, rows_of(1), stand_in, *PRICES, "--max_requests", "3")
    capsys.readouterr()
    run(tmp_path, rows_of(1), stand_in, *PRICES, "--max_cost", "0.004")
    assert len(stand_in.asked) == 3 and "leaves no room" in capsys.readouterr().err
    run(tmp_path, rows_of(1), stand_in, *PRICES, "--max_requests", "4")
    assert len(stand_in.asked) == 4 and len(lines(tmp_path / "out.jsonl")) == 1


def test_what_is_not_sent_counts_for_nothing(tmp_path, stand_in):
    options = [*write_input(tmp_path, rows_of(1)), "--model=stand-in", "--max_retries=2", "--max_requests=1"]
    with pytest.raises(TransientError, match=r"answers nothing \(broken connection\)"):
        annotate.main([*options, "--base_url=http://127.0.0.1:9/v1"])
    annotate.main([*options, f"--base_url={stand_in.url}"])
    assert len(lines(tmp_path / "out.jsonl")) == len(stand_in.asked) == 1


def test_what_a_proxy_refuses_counts_for_nothing(tmp_path, stand_in, monkeypatch):
    """The stand-in, as a proxy, answers CONNECT with a 501."""
    options = [*write_input(tmp_path, rows_of(1)), "--model=stand-in", "--max_retries=1", "--max_requests=1"]
    monkeypatch.setenv("HTTPS_PROXY", stand_in.url.removesuffix("/v1"))
    with pytest.raises(TransientError, match="answers nothing"):
        annotate.main([*options, "--base_url=https://endpoint.invalid/v1"])
    assert not any("input_tokens" in line["reply"] for line in lines(tmp_path / "out.journal.jsonl"))
    annotate.main([*options, f"--base_url={stand_in.url}"])
    assert len(lines(tmp_path / "out.jsonl")) == len(stand_in.asked) == 1


@pytest.mark.parametrize(
    "variables", [{"ALL_PROXY": "gopher://127.0.0.1:9"}, {"SSL_CERT_FILE": "/nowhere/ca.pem"}], ids=["proxy", "file"]
)
def test_a_client_that_cannot_be_made_is_told(tmp_path, stand_in, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="proxies and of certificates"):
        run(tmp_path, rows_of(1), stand_in)
    assert not stand_in.asked


def test_an_empty_variable_of_the_url_is_none(tmp_path, monkeypatch):
    """The openai package takes it for a URL, and every request would fail."""
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # so that nothing is asked
    with pytest.raises(TransientError, match=r"https://api\.openai\.com/v1/? answers nothing"):
        annotate.main([*write_input(tmp_path, rows_of(1)), "--model=x", "--max_retries=0"])


@pytest.mark.parametrize("usage", [{"prompt_tokens": "many"}, {"prompt_tokens": -5, "completion_tokens": 1e300}, [3]])
def test_a_usage_that_is_none_is_assumed(tmp_path, stand_in, usage):
    stand_in.behave = lambda asked: Response(staged(asked.standard_answer), usage=usage)
    run(tmp_path, rows_of(1), stand_in, *PRICES, "--max_cost", "1")
    (line,) = lines(tmp_path / "out.journal.jsonl")
    assert line["reply"]["output_tokens"] == 300 and line["reply"]["input_tokens"] > 1000


def test_an_end_of_a_reply_that_is_unknown_says_nothing(tmp_path, stand_in):
    """Nor is it taken for one of the words by which the journal marks what is no reply."""
    stand_in.behave = lambda asked: Response(staged(asked.standard_answer), finish="failed")
    run(tmp_path, rows_of(1), stand_in)
    assert len(lines(tmp_path / "out.jsonl")) == len(stand_in.asked) == 1


def test_a_reply_that_is_nested_too_deeply_is_unreadable(tmp_path, stand_in, capsys):
    stand_in.behave = by_question({"Which is q0?": [Response(raw=b"[" * 200_000)]})
    run(tmp_path, rows_of(1), stand_in)
    assert "unreadable reply 1" in capsys.readouterr().out and len(lines(tmp_path / "out.jsonl")) == 1


def test_a_short_key_is_a_word_like_others_and_a_long_one_is_not_written(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "picture")
    run(tmp_path, rows_of(1), stand_in)
    assert lines(tmp_path / "out.jsonl")[0]["conversations"][1]["value"] == staged("thing 0")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stand_in.model = KEY
    stand_in.behave = by_question({"Which is q1?": [Response(staged(KEY))] * 2})
    run(tmp_path, rows_of(3), stand_in)
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 2]
    assert KEY not in "".join(path.read_text() for path in tmp_path.glob("*.jsonl"))
    (rejected,) = lines(tmp_path / "out.rejected.jsonl")
    assert rejected["detail"] == "it has the key of the endpoint in it"


def test_an_image_is_read_anew_by_the_next_run_and_another_one_is_asked_about(tmp_path, stand_in):
    rows, image = rows_of(2), tmp_path / "images" / "b.png"
    options = write_input(tmp_path, [rows[0], rows[1] | {"image": "b.png"}])
    given = [*options, "--model=x", f"--base_url={stand_in.url}"]
    Image.new("RGB", (20, 10), "blue").save(image)
    whole = image.read_bytes()
    image.write_bytes(whole[:40])
    annotate.main(given)
    assert [row["reason"] for row in lines(tmp_path / "out.rejected.jsonl")] == ["unusable image"]
    image.write_bytes(whole)
    annotate.main(given)
    assert len(lines(tmp_path / "out.jsonl")) == len(stand_in.asked) == 2
    Image.new("RGB", (20, 10), "#0000fe").save(image)
    assert image.stat().st_size == len(whole)
    annotate.main(given)
    assert len(stand_in.asked) == 3


def test_an_unreadable_check_is_asked_once_more_and_a_refused_one_is_no_fault_of_the_answer(tmp_path, stand_in):
    verdicts = {
        "Which is q0?": [Response("perhaps"), Response("Verdict: yes")],
        "Which is q1?": [Response("Yes, both are th", finish="length")],
        "Which is q2?": [Response("against the policy", status=400)],
    }

    def behave(asked: Asked) -> Response:
        return verdicts[asked.question].pop(0) if asked.is_check else Response(staged("the thing"))

    stand_in.behave = behave
    run(tmp_path, rows_of(3), stand_in, *ONE)
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 1]
    (rejected,) = lines(tmp_path / "out.rejected.jsonl")
    assert rejected["reason"] == "refused request" and "could not be checked" in rejected["detail"]
    assert len(rejected["tries"]) == 1 and not any(verdicts.values())


def test_no_file_of_others_is_overwritten(tmp_path, stand_in):
    given = write_input(tmp_path, rows_of(1))
    for name in ("in.rejected.jsonl", "in.journal.jsonl"):
        (tmp_path / name).write_text(json.dumps(rows_of(1)[0]) + "\n")
        options = [f"--input={tmp_path / name}", given[1], f"--output={tmp_path}/in.jsonl"]
        with pytest.raises(UserError, match=f"would overwrite the file of the questions, .*/{name}"):
            annotate.main([*options, "--model=x", f"--base_url={stand_in.url}"])
    (tmp_path / "in.journal.jsonl").unlink()
    with pytest.raises(UserError, match=r"in.rejected.jsonl exists, but in.journal.jsonl"):
        annotate.main([*given, f"--output={tmp_path}/in.jsonl", "--model=x", f"--base_url={stand_in.url}"])
    assert not stand_in.asked


@pytest.mark.parametrize("url", ["http://[::1", "http://localhost:abc/v1", "http://localhost:99999/v1"])
def test_a_url_that_is_none(tmp_path, url):
    with pytest.raises(UserError, match="--base_url is no URL of an endpoint"):
        annotate.main([*write_input(tmp_path, rows_of(1)), "--model=x", f"--base_url={url}"])


def test_keys_that_cannot_be_used(tmp_path, monkeypatch):
    options = [*write_input(tmp_path, rows_of(1)), "--model=x", "--base_url=http://localhost:1/v1"]
    with pytest.raises(UserError, match="--key_variable is no name") as ended:
        annotate.main([*options, f"--key_variable={KEY}"])
    assert KEY not in str(ended.value)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="the variable of --key_variable has no key") as ended:
        annotate.main([*options[:-1], "--key_variable=AIzaSecret"])
    assert "AIza" not in str(ended.value)
    for key in ("schlüssel-0123456789", "sk-0123456789\nabc"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="OPENAI_API_KEY has a key that cannot be sent"):
            annotate.main(options)
    with pytest.raises(UserError, match="a query or a fragment in it"):
        annotate.main([*options, "--base_url=http://localhost/v1#sk-0123456789"])


def test_a_text_row_with_the_marker_of_an_image_is_refused(tmp_path, stand_in):
    with pytest.raises(UserError, match="line 1: a question has the marker <image>, but the row has no image"):
        run(tmp_path, [{"id": 1, "question": "<image>\nWhich?", "answer": "a"}], stand_in)
