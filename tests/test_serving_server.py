"""A real server at a port: streams, clients that leave, signals."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import threading

import pytest
from fake_engine import serving, write_served

from jlora.serving.server import Server, bind
from jlora.serving.settings import ServeConfig
from jlora.system.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_served(tmp_path_factory.mktemp("served"))


class Running:
    """A real server on its own thread, at a port that was free."""

    def __init__(self, app, service):
        started = threading.Event()

        class Noting(Server):
            async def startup(self, sockets=None) -> None:
                await super().startup(sockets)
                started.set()

        self._listener = bind(service.settings)
        self.server = Noting(service, self._listener)
        self.address = self._listener.getsockname()[:2]
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        assert started.wait(20)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self._listener.close()
        assert not self.thread.is_alive()


@pytest.fixture
def running(folder):
    with contextlib.ExitStack() as stack:
        engine, app = stack.enter_context(serving(folder, port=0))
        service = app.user_middleware[-1].args[0]
        found = Running(app, service)
        stack.callback(found.close)
        stack.callback(engine.gate.set)
        yield engine, found


def post(server: Running, body: dict, path: str = "/v1/completions") -> http.client.HTTPConnection:
    """A connection over which a request was sent."""
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.request("POST", path, json.dumps(body))
    return connection


def test_a_real_server_streams(running):
    engine, server = running
    engine.gate.clear()
    with contextlib.closing(post(server, {"prompt": "a", "stream": True})) as connection:
        response = connection.getresponse()
        assert response.getheader("content-type") == "text/event-stream; charset=utf-8"
        first = response.readline()  # before the rest has been thought of
        assert json.loads(first[len("data: ") :])["choices"][0]["text"] == "f"
        engine.gate.set()
        assert response.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(running, stream: bool):
    engine, server = running
    engine.gate.clear()
    engine.script = lambda request: "a" * 90
    connection = post(server, {"prompt": "a", "stream": stream, "n": 3})
    if stream:
        connection.getresponse().readline()
    engine.wait_until(3)
    connection.close()
    if stream:
        connection.sock = None
    engine.wait_until_idle()  # while the gate is closed: nothing but the leaving ends them
    assert not engine.gate.is_set() and engine.ended == 3


def test_a_signal_finishes_what_runs_and_refuses_what_comes(running):
    engine, server = running
    engine.gate.clear()
    with contextlib.closing(post(server, {"prompt": "a", "stream": True})) as connection:
        response = connection.getresponse()
        response.readline()
        server.server.handle_exit(signal.SIGTERM, None)
        for path, status in (("/v1/completions", 503), ("/v1/load_lora_adapter", 503)):
            with contextlib.closing(post(server, {"prompt": "b"}, path)) as other:
                refused = other.getresponse()
                assert refused.status == status
                assert json.loads(refused.read())["error"]["code"] == "shutting_down"
        engine.gate.set()
        assert response.read().endswith(b"data: [DONE]\n\n")
    server.thread.join(20)
    assert not server.thread.is_alive()
    assert len(engine.requests) == 1


def test_a_second_signal_ends_what_runs(running):
    engine, server = running
    engine.gate.clear()
    with contextlib.closing(post(server, {"prompt": "a", "stream": True})) as connection:
        response = connection.getresponse()
        response.readline()
        for number in (signal.SIGINT, signal.SIGINT):
            server.server.handle_exit(number, None)
        rest = response.read()
        assert b"shutting_down" in rest and rest.endswith(b"data: [DONE]\n\n")
    server.thread.join(20)
    assert not server.thread.is_alive() and engine.ended == 1


def test_what_is_no_http_harms_nobody(running):
    _, server = running
    for raw in (b"\x16\x03\x01", b"GET / HTTP/9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n"
                b"Host: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{"):  # fmt: skip
        with socket.create_connection(server.address, timeout=20) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    with contextlib.closing(post(server, {"prompt": "a"})) as connection:
        assert json.loads(connection.getresponse().read())["choices"][0]["text"] == "fine"


@pytest.mark.parametrize("name", [" ", "a" * 39 + " b", "\t", "x,y", "'", "\u2028"])
def test_names_that_are_no_header(running, name: str):
    _, server = running
    with contextlib.closing(post(server, {"prompt": "a", name: 1})) as connection:
        response = connection.getresponse()
        assert response.status == 200 and response.getheader("x-jlora-warning").endswith("'")


def test_a_client_that_sends_too_much_hears_of_it(running):
    _, server = running
    large = {"prompt": "a" * 12_000_000}
    for _ in range(2):
        with contextlib.closing(post(server, large)) as connection:
            assert connection.getresponse().status == 413


def test_an_address_that_is_taken(running, folder):
    _, server = running
    for host, port in ((*server.address,), ("no.such.host.invalid", 0), ("192.0.2.1", 0)):
        with pytest.raises(UserError, match="choose another --host or --port"):
            bind(ServeConfig("m", host=host, port=port))
