"""Questions that the first process gives out to the others, which are threads here, each with its own connection."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from llava_cot_jax.errors import TransientError, UserError
from llava_cot_jax.hosts import question_server as module
from llava_cot_jax.hosts.lifeline import Lifeline
from llava_cot_jax.hosts.process_group import ProcessGroup
from llava_cot_jax.hosts.question_queue import QuestionQueue
from llava_cot_jax.hosts.question_server import QuestionServer, RemoteQuestions
from tests.processes import free_port

FIELDS = {"seed": "0", "the digest of the questions": "abc"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "MEETING_SECONDS", 5.0)
    monkeypatch.setattr(module, "HEARING_SECONDS", 1.0)


@pytest.fixture
def port() -> int:
    return free_port()


class First:
    """The first process: its queue, its server, and the rows that it stored, in the order in which they came."""

    def __init__(self, port: int, count: int, questions: range | list[int], keep: Callable | None = None) -> None:
        self.rows: list[tuple[int, dict]] = []
        self.queue = QuestionQueue(questions, keep or (lambda question, row: self.rows.append((question, row))))
        self.server = QuestionServer(ProcessGroup(f"localhost:{port}", count, 0), self.queue, FIELDS)

    def lose_everybody(self) -> None:
        """End as a process that is killed does."""
        self.server._listener.shutdown(socket.SHUT_RDWR)
        self.server._listener.close()
        for client in list(self.server._clients.values()):
            client.connection.shutdown(socket.SHUT_RDWR)


def other(port: int, index: int = 1, count: int = 2, **fields: str) -> RemoteQuestions:
    return RemoteQuestions(ProcessGroup(f"localhost:{port}", count, index), {**FIELDS, **fields})


def questions_of(source: RemoteQuestions) -> Iterator[int]:
    return iter(source.wait, None)


def test_each_question_is_answered_once_by_one_of_many(port):
    first, took = First(port, 9, range(200)), {index: [] for index in range(1, 9)}

    def work(index: int) -> None:
        source = other(port, index, 9)
        for question in questions_of(source):
            took[index].append(question)
            source.finish(question, {"answer": f"{question} é \n", "by": index})
        source.close()

    threads = [threading.Thread(target=work, args=(index,)) for index in took]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    first.server.close()
    assert sorted(question for each in took.values() for question in each) == list(range(200))
    assert sorted(question for question, _ in first.rows) == list(range(200))
    assert all(row == {"answer": f"{question} é \n", "by": row["by"]} for question, row in first.rows)
    assert all(question in took[row["by"]] for question, row in first.rows)
    assert first.queue.is_over


def test_questions_of_a_lost_process_go_to_the_others_at_once(port, warnings_of):
    First(port, 3, range(4))
    lost, left = other(port, 1, 3), other(port, 2, 3)
    assert [lost.take(), lost.take(), left.take(), left.take(), left.take()] == [0, 1, 2, 3, None]
    left.finish(2, {})
    left.finish(3, {})
    waited: list[int | None] = []
    thread = threading.Thread(target=lambda: waited.append(left.wait()))
    thread.start()
    time.sleep(0.2)
    assert not waited  # all that are left are with the other
    lost.close()  # as the system does for a process that is killed
    thread.join(5)
    assert waited == [0] and left.take() == 1
    left.finish(0, {})
    left.finish(1, {})
    assert left.wait() is None and left.is_over
    name = socket.gethostname()
    assert warnings_of.messages == [f"process 1 ({name}) was lost: the others answer the 2 questions that it had"]


def test_the_first_process_comes_back_and_no_question_is_begun_twice(port):
    """What a process has in hand it keeps, and hands in to the process that was started again."""
    before = First(port, 2, range(6))
    source = other(port)
    assert [source.take() for _ in range(3)] == [0, 1, 2]
    source.finish(0, {"text": "a"})
    before.lose_everybody()
    answered: list[str] = []
    thread = threading.Thread(target=lambda: answered.append(source.finish(1, {"text": "b"})))
    thread.start()
    time.sleep(0.5)
    assert not answered
    again = First(port, 2, [1, 2, 3, 4, 5])
    thread.join(5)
    assert answered == [None]
    assert again.queue.take("the first process") == 3  # 1 and 2 are in the hands of the other
    assert [source.take(), source.take(), source.take()] == [4, 5, None]
    for question in (2, 4, 5):
        source.finish(question, {})
    again.queue.finish(3, {})
    assert source.wait() is None
    assert [question for question, _ in before.rows + again.rows] == [0, 1, 2, 4, 5, 3]


def test_a_process_that_was_started_again_takes_the_place_of_its_former_self(port):
    """Also where the thread that serves the former one waits for a question, and has not noticed its end."""
    first = First(port, 2, range(2))
    assert [first.queue.take("first"), first.queue.take("first")] == [0, 1]
    former = other(port)
    module._send(former._stream, {"ask": "wait"})
    time.sleep(0.2)
    former._connection.shutdown(socket.SHUT_RDWR)  # as the system does for a process that is killed
    now = other(port)
    assert now.take() is None
    assert first.queue.give_back("first") == 2
    assert {now.wait(), now.wait()} == {0, 1}
    now.finish(0, {})
    now.finish(1, {})
    assert now.wait() is None and first.queue.is_over


def test_two_processes_with_one_index(port, monkeypatch):
    monkeypatch.setattr(module, "MEETING_SECONDS", 1.0)
    First(port, 2, range(3))
    one = other(port)
    assert one.take() == 0
    with pytest.raises(TransientError, match=r"process 1 is there already, on .*: give each process an index"):
        other(port)
    assert one.take() == 1


def test_all_is_not_over_while_another_has_a_question(port):
    """A question that was lost twice, and answered by the first of the two, is no question to wait for."""
    first = First(port, 4, range(2))
    one, two, three = (other(port, index, 4) for index in (1, 2, 3))
    assert [one.take(), three.take()] == [0, 1]
    first.queue.give_back(next(h for q, h in first.queue._holders.items() if q == 0))  # the connection of one broke
    assert two.take() == 0
    two.close()
    over: list[None] = []
    waiting = threading.Thread(target=lambda: over.append(first.queue.wait("first")))
    time.sleep(0.3)
    one.finish(0, {"by": 1})
    waiting.start()
    waiting.join(0.3)
    assert not over and not first.queue.is_over
    three.finish(1, {"by": 3})
    waiting.join(5)
    assert over == [None] and first.rows == [(0, {"by": 1}), (1, {"by": 3})]


def test_a_failure_to_reach_the_first_is_told_once(port, monkeypatch):
    first = First(port, 2, range(2))
    source = other(port)
    assert source.take() == 0
    first.lose_everybody()
    monkeypatch.setattr(module, "MEETING_SECONDS", 0.5)
    with pytest.raises(TransientError):
        source.take()
    monkeypatch.setattr(module, "MEETING_SECONDS", 60.0)
    with pytest.raises(TransientError, match="gave up after 0 s"):
        source.finish(0, {})


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"HTTP/1.1 400\r\n\r\n", "no process that waits for this run"),
        (b"[1]\n", "no process that waits"),
        (b"", "it closed"),
    ],
)
def test_something_else_at_the_port_of_the_first(port, monkeypatch, sent, why):
    monkeypatch.setattr(module, "MEETING_SECONDS", 0.5)

    def answer() -> None:
        while True:
            connection, _ = listener.accept()
            connection.recv(10**6)
            connection.sendall(sent)
            connection.close()

    with socket.create_server(("localhost", port)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(TransientError, match=why):
            other(port)


def test_a_host_that_does_not_exist(monkeypatch):
    monkeypatch.setattr(module, "MEETING_SECONDS", 0.5)
    with pytest.raises(TransientError, match=r"process 0 at no\.such\.host\.invalid:1234: there is no such name"):
        RemoteQuestions(ProcessGroup("no.such.host.invalid:1234", 2, 1), FIELDS)


def test_one_divides_questions_and_one_shares_a_model(port):
    """Each is told so by the other, whichever is the first process."""
    First(port, 2, range(2))
    left: list[int] = []
    lifeline = Lifeline(ProcessGroup(f"localhost:{port}", 2, 1), left.append)
    with lifeline._hub.changed:
        assert lifeline._hub.changed.wait_for(lambda: lifeline._hub.failure, 5)
    failure = lifeline._hub.failure
    assert failure.code == 2 and "but process 0 divides questions: give all processes the same --hosts.divide" in str(
        failure
    )


def test_the_first_shares_a_model_and_another_divides_questions(port):
    Lifeline(ProcessGroup(f"localhost:{port}", 2, 0), lambda code: None)
    with pytest.raises(UserError, match=r"process 0 shares one model, .*: give all processes the same --hosts.divide"):
        other(port)


def test_the_first_answer_counts(port):
    first = First(port, 2, range(2))
    slow = other(port)
    assert slow.take() == 0
    first.queue.give_back(next(iter(first.queue._holders.values())))  # as if its connection had been lost
    assert first.queue.take("another") == 0
    first.queue.finish(0, {"by": "another"})
    slow.finish(0, {"by": "slow"})
    assert first.rows == [(0, {"by": "another"})]


def test_processes_that_differ_are_refused(port):
    First(port, 2, range(2))
    with pytest.raises(
        UserError, match=r"the processes of the run differ: seed is 0 in process 0 \(.*\) and 1 in process 1"
    ):
        other(port, seed="1")
    with pytest.raises(UserError, match="this process was told of 3 processes, but process 0 of 2: give all the same"):
        other(port, 1, 3)


def test_a_port_that_is_taken(port):
    First(port, 2, range(2))
    with pytest.raises(
        UserError, match=f"process 0 cannot listen at port {port}.*: address already in use; name another"
    ):
        First(port, 2, range(2))


def test_a_first_process_that_never_comes(port, monkeypatch, warnings_of):
    monkeypatch.setattr(module, "MEETING_SECONDS", 1.5)
    monkeypatch.setattr(module, "FIRST_NOTICE_SECONDS", 0.5)
    here = f"process 0 at localhost:{port}: connection refused (this is process 1 of 2, by the options of hosts)"
    with pytest.raises(TransientError) as caught:
        other(port)
    assert str(caught.value).startswith(f"gave up after 2 s of waiting for {here}; to run with this process alone")
    assert len(warnings_of.messages) == 1 and warnings_of.messages[0].startswith(f"waiting for {here}")


def test_a_process_that_comes_when_all_is_answered(port):
    first = First(port, 3, [])
    ended = threading.Thread(target=first.server.close)
    ended.start()
    sources = [other(port, index, 3) for index in (1, 2)]
    assert all(source.is_over and source.wait() is None for source in sources)
    [source.close() for source in sources]
    ended.join(3)
    assert not ended.is_alive()


def test_a_process_that_never_came(port, monkeypatch, warnings_of):
    monkeypatch.setattr(module, "MEETING_SECONDS", 1.0)
    monkeypatch.setattr(module, "FIRST_NOTICE_SECONDS", 0.3)
    First(port, 2, []).server.close()
    assert warnings_of.messages == [
        "all is answered; waiting for process 1 to come, and to hear of it",
        "process 1 never came: the others have answered all questions",
    ]


def test_one_that_loads_its_weights_hears_that_all_is_answered(port):
    """It asks only after the first process has ended, and does not wait for it to come back."""
    first = First(port, 2, [0])
    source = other(port)
    first.queue.finish(first.queue.take("first"), {})
    first.server.close()
    assert source.wait() is None and source.is_over


def test_a_row_that_cannot_be_stored_ends_the_first_process(port, warnings_of):
    def keep(question: int, row: dict) -> None:
        raise UserError("no space left on the disk")

    first = First(port, 2, range(3), keep)
    source = other(port)
    threading.Thread(target=lambda: source.finish(source.take(), {}), daemon=True).start()
    with pytest.raises(UserError, match="no space left"):
        while True:
            first.queue.take("first")
            time.sleep(0.05)
    assert not warnings_of.messages  # the other was not lost


def test_a_stranger_does_no_harm(port):
    first = First(port, 2, range(2))
    first.queue._is_row = lambda question, row: row.get("id") == question
    hello = {"process": 1, "count": 2, "host": "x", "token": "t", "fields": FIELDS, "holds": []}
    unusable = [
        {**hello, name: value} for name, value in (("process", 0), ("process", 2), ("process", "x"), ("holds", 7))
    ]
    unusable += [{name: hello[name] for name in hello if name != missing} for missing in ("count", "fields", "host")]
    lines = [b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00\n", b"[]\n", b"{}\n", b"1\n", b"[" * 10**5 + b"\n"]
    for sent in [*lines, *(json.dumps(each).encode() + b"\n" for each in unusable)]:
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(sent)
            stranger.settimeout(5)
            assert received(stranger) == b"", sent[:80]
    for asked in ({"ask": "all"}, {"question": 0, "row": {"id": 7}}, {"question": 0, "row": []}):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(json.dumps(hello).encode() + b"\n" + json.dumps(asked).encode() + b"\n")
            stranger.settimeout(5)
            assert received(stranger) == b'{"is_over": false}\n', asked
    source = other(port)
    assert [source.take(), source.take()] == [0, 1] and not first.rows
    source.finish(0, {"id": 0})
    source.finish(1, {"id": 1})
    first.server.close()
    assert source.wait() is None


def received(connection: socket.socket) -> bytes:
    """Return all that comes until the connection ends."""
    parts = []
    with contextlib.suppress(ConnectionResetError):  # what was sent was not read to its end
        while part := connection.recv(1000):
            parts.append(part)
    return b"".join(parts)
