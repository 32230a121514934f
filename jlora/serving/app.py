"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jlora.serving import chat, completions
from jlora.serving.adapters import AdapterChanges
from jlora.serving.answers import Choice, ClientGone
from jlora.serving.errors import ApiError, draining
from jlora.serving.fields import Fields, chat_fields, completion_fields, parse_body
from jlora.serving.guard import GONE, Guard
from jlora.serving.page import read_page
from jlora.serving.service import Service
from jlora.serving.stream import EventStream
from jlora.serving.voices import Voice

WARNING = "x-jlora-warning"
DISCARDED, DISCARD_SECONDS = 64_000_000, 3.0  # of a body that is too large, at most


def make_app(service: Service) -> Starlette:
    """The ASGI application of a server."""
    routes = Routes(service)
    table = [
        ("/", routes.page, "GET"),
        ("/health", routes.health, "GET"),
        ("/metrics", routes.metrics, "GET"),
        ("/v1/models", routes.models, "GET"),
        ("/v1/models/{id:path}", routes.model, "GET"),
        ("/v1/chat/completions", routes.chat, "POST"),
        ("/v1/completions", routes.completions, "POST"),
        ("/v1/load_lora_adapter", routes.load, "POST"),
        ("/v1/unload_lora_adapter", routes.unload, "POST"),
    ]
    middleware = [Middleware(Guard, service, {endpoint: path for path, endpoint, _ in table})]
    if service.settings.cors:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware, allow_origins=service.settings.cors,
                allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=(WARNING,),
            ),
        )  # fmt: skip
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, endpoint, method in table],
        middleware=middleware,
        exception_handlers={HTTPException: not_served},
    )
    app.router.redirect_slashes = False
    return app


async def not_served(request: Request, error: HTTPException) -> Response:
    """No such route, or not with this method."""
    what = f"{request.method} {request.url.path}"
    known = "see docs/serve.md for what there is"
    if error.status_code == 405:
        known = f"use {', '.join(error.headers.get('Allow', '').split(', '))}"
    found = ApiError(
        f"{what} is not served; {known}", error.status_code, code="unknown_url",
        headers=dict(error.headers or {}),
    )  # fmt: skip
    return found.response()


class Routes:
    """What answers each path."""

    def __init__(self, service: Service):
        self._service = service
        self._adapters = AdapterChanges(service)

    async def page(self, request: Request) -> Response:
        body, headers = read_page()
        return Response(body, headers=headers)

    async def health(self, request: Request) -> Response:
        if self._service.draining:
            raise draining()
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        text = await run_in_threadpool(self._service.metrics.text)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(self, request: Request) -> Response:
        data = [self._entry(voice) for voice in self._service.voices.values()]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._entry(self._service.voice(request.path_params["id"])))

    def _entry(self, voice: Voice) -> dict[str, Any]:
        return {
            "id": voice.name,
            "object": "model",
            "created": voice.created,
            "owned_by": "jlora",
            "root": voice.root,
            "parent": None if voice.adapter is None else self._service.base.name,
            "max_model_len": self._service.engine.model_config.max_positions,
            "jlora": {"chat": voice.template is not None, "task": voice.task},
        }

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat_fields, chat.plan, chat.ChatWriter)

    async def completions(self, request: Request) -> Response:
        return await self._answer(
            request, completion_fields, completions.plan, completions.CompletionWriter
        )

    async def _answer(
        self, request: Request, read: Callable[[Mapping[str, Any]], Any], plan: Callable,
        writer_of: Callable,
    ) -> Response:  # fmt: skip
        service = self._service

        def planned(raw: bytes) -> tuple[Fields, Voice, list[Choice]]:
            fields = read(parse_body(raw))
            voice = service.voice(fields.model)
            request.state.model = voice.name
            return fields, voice, plan(service, fields, voice)

        fields, voice, choices = await run_in_threadpool(planned, await self._body(request))
        answers = service.begin(choices, request.state.began, voice.name)
        writer = writer_of(service, fields, voice.name)
        headers = warning(fields.ignored)
        if fields.stream:
            return EventStream(answers, writer.chunks(answers), headers)
        try:
            async with answers.watching(request.receive):
                return JSONResponse(await writer.whole(answers), headers=headers)
        except ClientGone:
            return Response(status_code=GONE)
        finally:
            answers.close()

    async def load(self, request: Request) -> Response:
        values = parse_body(await self._body(request))
        return PlainTextResponse(await self._adapters.load(values))

    async def unload(self, request: Request) -> Response:
        values = parse_body(await self._body(request))
        return PlainTextResponse(await self._adapters.unload(values))

    async def _body(self, request: Request) -> bytes:
        """The body of a request, which must come in time and not be too large."""
        settings = self._service.settings
        limit = int(settings.max_body_mb * 1e6)
        length = request.headers.get("content-length", "0")
        announced = not length.isdecimal() or int(length) > limit

        async def read() -> bytes:
            body = bytearray()
            if not announced:
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        break
                else:
                    return bytes(body)
            await discard(request)
            raise ApiError(
                f"the body is larger than {settings.max_body_mb:g} MB (--max-body-mb)", 413,
                code="too_large", headers={"connection": "close"},
            )  # fmt: skip

        try:
            return await asyncio.wait_for(read(), settings.timeout)
        except asyncio.TimeoutError:
            raise ApiError(
                "the body did not come in time", 408, code="timeout",
                headers={"connection": "close"},
            ) from None  # fmt: skip


async def discard(request: Request) -> None:
    """Read the rest of a body that is not wanted, within limits.

    Who is sent an answer before it has sent everything may see its connection break, and no answer.
    """

    async def read() -> None:
        left = DISCARDED
        while left > 0:
            message = await request.receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                break

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), DISCARD_SECONDS)


def warning(ignored: Sequence[str]) -> dict[str, str]:
    """A header that names fields of a request that had no effect."""
    if not ignored:
        return {}
    names = [f"'{ascii(name)[1:-1][:40]}'" for name in ignored[:20]]
    more = "" if len(ignored) <= 20 else f" and {len(ignored) - 20} more"
    return {WARNING: f"ignored unknown fields: {', '.join(names)}{more}"}
