"""The answers to one request, as the engine's thread gives their tokens to the server's loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jlora.data.tokenizer import Tokenizer
from jlora.decoding.requests import Event, QueueFull, Request, Stopping, TooLarge, Usage
from jlora.decoding.text_stream import TextStream
from jlora.serving.errors import NO_RETRY, ApiError, draining, internal
from jlora.serving.voices import Prompt
from jlora.system.errors import UserError

LOG = logging.getLogger("jlora.serving")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Score:
    """A token with its log-probability and the likeliest ones in its place.

    Attributes:
        logprob: None: a prompt's first token has none.
        offset: where the token's text begins in the text of the answer.
    """

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]]
    offset: int = 0


class _WholeText:
    """Decodes all tokens, special ones too."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class Choice:
    """One answer as it grows.

    Args:
        index: its number in the response.
        request: what the engine is asked.
        echoed: the prompt that the answer is to begin with; None: it does not.
        stops: texts that end the answer.
        scored: whether log-probabilities were asked for.
        follows: whether the answer goes on with the prompt's text.
        whole: whether special tokens are shown, as marks of tool calls may be.

    Attributes:
        echoed: the prompt's text, if the answer begins with it; else nothing.
        shown: the answer's text up to now, in pieces.
        scores: of the answer's tokens, if ``scored``.
        prompt_scores: of the prompt's, if the request asks for them.
        reason: ``finish_reason``, as soon as it is known.
        usage: once nothing more comes.
    """

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer, stops: Sequence[str] = (),
        scored: bool = False, follows: bool = False, whole: bool = False,
        echoed: Prompt | None = None,
    ):  # fmt: skip
        self.index, self.request, self._tokenizer = index, request, tokenizer
        after = request.prompt[-4:] if follows else ()
        shown = _WholeText(tokenizer) if whole else tokenizer
        self._text = TextStream(shown, stops, after)
        self._plain = TextStream(shown, after=after) if scored else None  # for offsets
        self._count = 0
        self._offsets: list[int] = []
        self.echoed = ""
        if echoed is not None:
            self._echo(echoed)
        self._length = len(self.echoed)
        self.shown: list[str] = []
        self.scores: list[Score] = []
        self.prompt_scores: list[Score] = []
        self.reason: str | None = None
        self.usage: Usage | None = None

    @property
    def text(self) -> str:
        """What is shown, all together."""
        return self.echoed + "".join(self.shown)

    @property
    def shown_scores(self) -> list[Score]:
        """`scores` without those of a stop text's tokens."""
        if not self._text.stopped:
            return self.scores
        return [score for score in self.scores if score.offset < len(self.text)]

    def take(self, event: Event) -> str:
        """Note an event; the text that can be shown now."""
        piece = self._take(event)
        self.shown.append(piece)
        return piece

    def _take(self, event: Event) -> str:
        if event.kind == "token":
            return self._take_token(event)
        if event.kind == "prompt":
            found = zip(self.request.prompt, event.prompt_logprobs, self._offsets)
            self.prompt_scores = [
                Score(token, *(each or (None, ())), offset) for token, each, offset in found
            ]
            return ""
        piece = ""
        usage = event.usage
        if self.reason is None:
            piece = self._text.finish()
            self.reason = "stop" if self._text.stopped else event.reason
        else:  # a stop text was found, while the engine may have gone on
            usage = Usage(usage.prompt, usage.cached, self._count)
        self.usage = usage
        return piece

    def _take_token(self, event: Event) -> str:
        if self.reason is not None:
            return ""
        self._count += 1
        if self._plain is not None:
            self.scores.append(Score(event.token, event.logprob, event.top, self._length))
            self._length += len(self._plain.add(event.token))
        piece = self._text.add(event.token)
        if self._text.stopped:
            self.reason = "stop"
        return piece

    def end(self) -> None:
        """Nothing more of the answer is wanted."""
        self.reason = self.reason or "stop"

    def _echo(self, prompt: Prompt) -> None:
        """Find the prompt's text, and where its tokens begin in it."""
        if prompt.text is not None and self.request.prompt_logprobs is None:
            self.echoed = prompt.text
            return
        stream, shown = TextStream(_WholeText(self._tokenizer)), ""
        last = len(prompt.ids) - prompt.after
        for place, token in enumerate(prompt.ids):
            self._offsets.append(len(shown))
            if prompt.before <= place < last:
                shown += stream.add(token)
        self.echoed = shown + stream.finish() if prompt.text is None else prompt.text


class Inbox:
    """What other threads put in, for one coroutine of the present loop to take."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._items: deque[Any] = deque()
        self._ready = asyncio.Event()
        self._woken = False
        self._failure: Exception | None = None

    def put(self, item: Any) -> None:
        """From any thread."""
        self._items.append(item)
        if not self._woken:  # one wake-up for all that come before it is noticed
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._ready.set)

    def fail(self, error: Exception) -> None:
        """Have `get` raise an error; from the loop's thread."""
        self._failure = error
        self._ready.set()

    async def get(self, timeout: float) -> list[Any]:
        """All that is there, at least one thing.

        Raises:
            asyncio.TimeoutError: nothing came in ``timeout`` seconds.
            Exception: that of `fail`.
        """
        while True:
            self._woken = False
            if self._failure is not None:
                raise self._failure
            if self._items:
                found = []
                while self._items:
                    found.append(self._items.popleft())
                return found
            self._ready.clear()
            if not self._items and self._failure is None:
                await asyncio.wait_for(self._ready.wait(), timeout)


class Answers:
    """All answers to one request: submitted together, given up together.

    Args:
        engine: a `jlora.serving.engine.Engine`.
        choices: what to ask it.
        deadline: of `time.monotonic`.
        on_first: called when the first token comes.
        on_close: called at the end, with these answers.

    Raises:
        ApiError: the engine takes none of them now, or ever.
    """

    def __init__(
        self, engine: Any, choices: Sequence[Choice], deadline: float,
        on_first: Callable[[], None] = lambda: None,
        on_close: Callable[[Answers], None] = lambda answers: None,
    ):  # fmt: skip
        self.choices, self._deadline = choices, deadline
        self._on_first, self._on_close = on_first, on_close
        self._inbox = Inbox()
        self._tickets: list[Any] = []
        try:
            for choice in choices:
                self._tickets.append(engine.submit(choice.request, self._listener(choice)))
        except Exception as error:
            self._cancel()
            raise api_error(error) from error

    def _listener(self, choice: Choice) -> Callable[[Event], None]:
        put = self._inbox.put
        return lambda event: put((choice, event))

    def close(self) -> None:
        """Free the rows of all answers that are not complete; nothing more is wanted."""
        self._cancel()
        self._on_close(self)

    def _cancel(self) -> None:
        for ticket, choice in zip(self._tickets, self.choices):
            if choice.usage is None:
                ticket.cancel()

    def stop(self, choice: Choice) -> None:
        """End one answer where it is."""
        choice.end()
        self._tickets[self.choices.index(choice)].cancel()

    def fail(self, error: Exception) -> None:
        """Have the answers end with an error."""
        self._inbox.fail(error)

    async def pieces(self) -> AsyncIterator[list[tuple[Choice, str, bool]]]:
        """New text of the answers, as it comes, and whether that is the end of one.

        Raises:
            ApiError: one of them failed, or the time is over.
            ClientGone: see `watching`.
        """
        left = len(self.choices)
        first = True
        while left:
            try:
                items = await self._inbox.get(self._deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise ApiError(
                    "the time for a request is over; ask for fewer tokens, or later",
                    504, code="timeout", headers=NO_RETRY,
                ) from None  # fmt: skip
            found: dict[Choice, str] = {}
            for choice, event in items:
                if event.kind == "error":
                    raise api_error(event.error) from event.error
                if event.reason == "cancelled" and choice.reason is None:
                    raise draining()
                if first and event.kind == "token":
                    first = False
                    self._on_first()
                ended = choice.reason is not None
                found[choice] = found.get(choice, "") + choice.take(event)
                if choice.usage is not None:
                    left -= 1
                elif choice.reason is not None and not ended:
                    self.stop(choice)
            yield [(choice, piece, choice.usage is not None) for choice, piece in found.items()]

    @contextlib.asynccontextmanager
    async def watching(self, receive: Callable[[], Any]) -> AsyncIterator[None]:
        """Have `pieces` raise ClientGone as soon as the client leaves."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._inbox.fail(ClientGone())

        watcher = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(str(error), 429, code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, TooLarge):
        return ApiError(str(error), 413, code="too_large")
    if isinstance(error, Stopping):
        return ApiError(str(error), 503, code="shutting_down", headers={"retry-after": "5"})
    if isinstance(error, UserError):
        return ApiError(str(error))
    LOG.error("a request failed", exc_info=error)
    return internal()
