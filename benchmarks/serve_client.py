"""A client of OpenAI's protocol that costs little beside the server it measures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

LIMIT = 1 << 24  # bytes of a line


@dataclass
class Answer:
    """What came of a request.

    Attributes:
        status: HTTP's.
        sent: when the request was on its way, by `time.perf_counter`.
        times: when each piece of text came.
        text: all of it.
        reason: finish_reason; None: the answer broke off.
        tokens: as the server counts them; None: it does not say.
        error: body of a refusal, or an error within the stream.
    """

    status: int = 0
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    tokens: int | None = None
    error: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first piece."""
        return self.times[0] - self.sent

    @property
    def step(self) -> float:
        """Mean seconds between two tokens; a piece may hold several."""
        return (self.times[-1] - self.times[0]) / max((self.tokens or len(self.times)) - 1, 1)


@contextlib.asynccontextmanager
async def request(address: str, path: str, data: bytes | None, method: str = "POST"):
    """Send a request; gives its status and the lines of the body, and goes away at the end."""
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=LIMIT)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        if data is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        writer.write(head.encode() + b"\r\n" + (data or b""))
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        yield status, read_lines(reader, "transfer-encoding: chunked" in head)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def read_lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[str]:
    """The lines of a body that ends with the connection or with an empty chunk."""
    if not chunked:
        while line := await reader.readline():
            yield line.decode().rstrip("\r\n")
        return
    rest = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        *lines, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
        for line in lines:
            yield line.decode().rstrip("\r")
    if rest:
        yield rest.decode()


async def stream(
    address: str,
    body: dict,
    path: str = "/v1/completions",
    on_piece: Callable[[Answer], bool | None] = lambda answer: None,
) -> Answer:
    """Ask, and read the answer as it comes.

    Args:
        address: such as http://127.0.0.1:8080.
        on_piece: called at every piece; if it returns True the client goes away.
    """
    answer = Answer(sent=time.perf_counter())
    async with request(address, path, json.dumps(body).encode()) as (answer.status, lines):
        if answer.status != 200:
            answer.error = "\n".join([line async for line in lines])
            return answer
        async for line in lines:
            if line.startswith("data: {"):
                take(answer, json.loads(line[6:]))
                if answer.error or (answer.times and on_piece(answer)):
                    break
    return answer


def take(answer: Answer, event: dict) -> None:
    """Add an event of a stream to the answer."""
    if "error" in event:
        answer.error = json.dumps(event["error"])
    for choice in event.get("choices", []):
        piece = choice.get("text") or (choice.get("delta") or {}).get("content")
        if piece:
            answer.times.append(time.perf_counter())
            answer.text += piece
        answer.reason = choice.get("finish_reason") or answer.reason
    if event.get("usage"):
        answer.tokens = event["usage"]["completion_tokens"]


async def all_at_once(address: str, bodies: Sequence[dict]) -> list[Answer]:
    """The answers to requests that are sent together."""
    return list(await asyncio.gather(*(stream(address, body) for body in bodies)))
