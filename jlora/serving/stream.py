"""Answers as server-sent events, which OpenAI's clients read as they come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response

from jlora.serving.answers import LOG, Answers, ClientGone
from jlora.serving.errors import ApiError, internal


class EventStream(Response):
    """A response of JSON objects, each as soon as it is there; ends in ``[DONE]``.

    An error on the way is the last object, in OpenAI's form.

    Args:
        answers: closed at the end, whatever happens.
        chunks: lists of objects.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answers: Answers,
        chunks: AsyncIterator[list[dict[str, Any]]],
        headers: Mapping[str, str],
    ):
        self._answers, self._chunks = answers, chunks
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        )
        del self.headers["content-length"]

    async def __call__(self, scope, receive, send) -> None:
        async def write(text: str, more: bool = True) -> None:
            body = text.encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        start = {"status": self.status_code, "headers": self.raw_headers}
        try:
            async with self._answers.watching(receive):
                await send({"type": "http.response.start", **start})
                try:
                    async for objects in self._chunks:
                        await write("".join(map(event, objects)))
                except ApiError as error:
                    await write(event(error.body()))
                except (ClientGone, OSError):
                    return
                except Exception:
                    LOG.exception("an answer failed")
                    await write(event(internal().body()))
                await write("data: [DONE]\n\n", more=False)
        except OSError:  # the client left while we wrote
            return
        finally:
            self._answers.close()
            await self._chunks.aclose()


def event(value: dict[str, Any]) -> str:
    """One object as an event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
