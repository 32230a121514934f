"""A server that speaks OpenAI's protocol and says what the test wants, for the page's tests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from jlora.serving.page import read_page

MODELS = [
    {"id": "smollm2-135m", "root": "smollm2-135m", "parent": None},
    {"id": "café", "root": "runs/café/adapter", "parent": "smollm2-135m"},
    {"id": "sql", "root": "runs/sql/adapter", "parent": "smollm2-135m"},
    {"id": "e2e", "root": "runs/e2e/adapter", "parent": "smollm2-135m", "jlora": {"chat": False}},
]


class Stub(ThreadingHTTPServer):
    """Answers every prompt by its own words, one a piece.

    Attributes:
        asked: (path, body, headers) of every request.
        gate: answers stop in the middle until it is set.
        left: set when a client has gone before its answer's end.
        answers: model -> the pieces that it says instead.
        key: where not empty, the key that is demanded.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.answers, self.key = [], {}, ""
        self.gate, self.left = threading.Event(), threading.Event()
        self.gate.set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def bodies(self) -> list[dict]:
        return [body for _, body, _ in self.asked if body]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append((self.path, None, dict(self.headers)))
        if self.path == "/":
            page, headers = read_page()
            self.reply(200, page, headers)
        elif self.path != "/v1/models":
            self.fail(404, f"no such address: {self.path}")
        elif self.allowed():
            self.reply(200, json.dumps({"object": "list", "data": MODELS}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, dict(self.headers)))
        if not self.allowed():
            return
        if body.get("temperature", 0) > 1.5:
            self.fail(400, "temperature <must> be at most 1.5 & was not")
            return
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(self.said(body))}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            self.reply(200, json.dumps({"choices": [choice]}).encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for line in self.stream(body):
                self.wfile.write(f"{line}\n\n".encode())
                self.wfile.flush()
        except OSError:
            self.server.left.set()

    def said(self, body: dict) -> list[str]:
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        said = [f"{body['model']}:", *(f" {word}" for word in prompt.split())]
        return self.server.answers.get(body["model"], said)[: body.get("max_tokens", 256)]

    def stream(self, body: dict) -> Iterator[str]:
        pieces = self.said(body)
        for i, piece in enumerate(pieces):
            while i == 1 and not self.server.gate.wait(0.05):
                yield ": a comment, whose writing shows whether the client is there"
            yield event(index=0, finish_reason=None, delta={"content": piece}, text=piece)
        reason = "length" if len(pieces) == body.get("max_tokens") else "stop"
        yield event(index=0, finish_reason=reason, delta={}, text="")
        yield "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": len(pieces)}})
        yield "data: [DONE]"

    def allowed(self) -> bool:
        if not self.server.key or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self.fail(401, "the API key is missing or wrong")
        return False

    def fail(self, status: int, message: str) -> None:
        self.reply(status, json.dumps({"error": {"message": message, "type": "x"}}).encode())

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def event(**choice) -> str:
    return "data: " + json.dumps({"choices": [choice]})


@contextlib.contextmanager
def serving() -> Iterator[Stub]:
    with Stub() as stub:
        thread = threading.Thread(target=stub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield stub
        finally:
            stub.gate.set()
            stub.shutdown()
            thread.join()
