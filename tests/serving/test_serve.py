"""The command ``serve``: what it refuses before it loads anything, and its signals."""

import asyncio
import errno
import logging
import os
import signal
import socket
import threading

import pytest
import requests
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from llava_cot_jax import serve as module
from llava_cot_jax.errors import UserError
from llava_cot_jax.search.strategies import Greedy
from llava_cot_jax.serve import main
from llava_cot_jax.serving import server
from llava_cot_jax.serving.dispatcher import Dispatcher
from llava_cot_jax.serving.sockets import is_loopback, listen, url_of
from tests.serving.servers import KEY, serving


def test_a_port_that_is_in_use():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen at 127.0.0.1 port {port}: .*; give another --port"):
            main(["--port", str(port)])


def test_without_its_extra(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UserError, match=r"serve needs starlette and uvicorn: pip install 'llava-cot-jax\[serve\]'"):
        main([])


@pytest.mark.parametrize("key", ["cl\u00e9", "key\n", " ", "a\tb"])
def test_a_key_that_no_client_can_send(monkeypatch, key):
    monkeypatch.setenv("LLAVA_COT_API_KEY", key)
    with pytest.raises(UserError, match="the key in LLAVA_COT_API_KEY must be of ASCII characters") as caught:
        main(["--checkpoint", "./nowhere"])
    assert key not in str(caught.value) or key == " "


def test_several_processes_need_one_model():
    several = ["--hosts.coordinator", "localhost:1", "--hosts.count", "2", "--hosts.index", "0"]
    with pytest.raises(UserError, match=r"each would be a server of its own: give --hosts\.count 1"):
        main(several)


@pytest.mark.parametrize("how", ["a key", "a permission", "an address of this machine"])
def test_what_lets_a_server_listen(monkeypatch, how):
    """The next thing that is checked is the checkpoint."""
    arguments = ["--checkpoint", "./nowhere", "--host", "127.0.0.2" if how.startswith("an") else "0.0.0.0"]
    if how == "a key":
        monkeypatch.setenv("LLAVA_COT_API_KEY", KEY)
    with pytest.raises(UserError, match="no such folder"):
        main(arguments + ["--allow_unauthenticated"] * (how == "a permission"))


def test_addresses():
    assert is_loopback("localhost") and is_loopback("127.0.0.3") and not is_loopback("0.0.0.0")
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://127.0.0.1:{port}/v1"
        socket.create_connection(("127.0.0.1", port)).close()


def test_a_machine_without_ipv6(monkeypatch):
    def refuse(*_) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(UserError, match=r"cannot listen at ::1 port 0: Address family not supported by protocol; give"):
        listen("::1", 0)


def test_a_second_signal_ends_the_process_at_once(monkeypatch, capsys):
    codes: list[int] = []
    monkeypatch.setattr(server.os, "_exit", codes.append)
    dispatcher, stopping = Dispatcher(lambda order: None, most_answers=4, most_searches=1), asyncio.Event()
    dispatcher.ready([Greedy()])
    dispatcher.ask(Greedy(), [], [0], tells_stages=False)
    server._on_signal(signal.SIGTERM, dispatcher, stopping)
    assert dispatcher.state == "stopping" and stopping.is_set() and not codes
    assert "1 answers are still to be given" in capsys.readouterr().err
    server._on_signal(signal.SIGTERM, dispatcher, stopping)
    assert codes == [128 + signal.SIGTERM]


def test_a_client_that_reads_nothing_does_not_keep_a_server_that_stops(monkeypatch):
    """Nothing is computed any more, and after a time its connection is ended."""
    monkeypatch.setattr(server, "LAST_READ_SECONDS", 0.2)
    dispatcher, told = Dispatcher(lambda order: None, most_answers=4, most_searches=1), threading.Event()

    async def wait_for_ever(request: object) -> Response:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()
        raise AssertionError

    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answering = server.Answering(lambda deliver: [], lambda: told.wait() and None, told.set)
        app = Starlette(routes=[Route("/", wait_for_ever)])
        assert server.serve_requests(listener, app, dispatcher, answering, lambda: None)


def test_an_adapter_of_a_verifier_that_no_search_asks(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 1, "llava_cot_verifier": true}')
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="which no search here asks: give --judge verifier"):
        main(["--verifier_adapter", str(tmp_path), "--searches", "greedy"])


def test_a_model_that_cannot_be_used_ends_the_command(monkeypatch, tmp_path):
    """The error of the thread that loads is that of the command. The port is free again."""
    monkeypatch.setattr(logging.getLogger("llava_cot_jax"), "propagate", True)
    with pytest.raises(UserError, match="the answer may take"):
        main(["--port", "0", "--prompt_tokens", "2000", "--max_new_tokens", "100"])


@pytest.mark.slow
def test_a_signal_while_it_loads_ends_the_command():
    """It has begun nothing. The thread that loads and compiles is not waited for."""
    with serving() as served:
        assert requests.get(f"{served.root}/health", timeout=60).json()["status"] == "starting"
        assert served.stop() == 0
        assert served.process.stderr and "Traceback" not in served.process.stderr.read()
