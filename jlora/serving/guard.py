"""What every request passes first: who asks, from where; and what is counted of it."""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from jlora.data.readers import shorten
from jlora.serving.answers import api_error
from jlora.serving.errors import ApiError, draining
from jlora.serving.service import Service
from jlora.serving.settings import is_loopback

#: Served without a key: nothing of them is secret, and a page can't send one.
OPEN = ("/", "/health")
GONE = 499  # nginx's number for a client that left before its answer


class Guard:
    """Middleware that refuses, counts, and keeps faults from the client.

    Without a key everyone on this machine may ask, web pages that its user looks at included: their
    browser sends what they like to the loopback address. So then the name that the page asked for
    (``Host``: a name may be given the address 127.0.0.1) and where it is from (``Origin``) must be
    this server's own, or one of ``cors``.
    """

    def __init__(self, app, service: Service, paths: Mapping[Any, str]):
        self._app, self._service, self._settings = app, service, service.settings
        self._paths = paths  # of endpoints, for the metrics
        self._key = self._settings.api_key and self._settings.api_key.encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500
        scope.setdefault("state", {}).update(began=began, model="")
        started = False

        async def noting(message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            status = GONE
        except Exception as error:
            response = api_error(error).response()
            if not started:
                await response(scope, receive, noting)
        finally:
            path = self._paths.get(scope.get("endpoint"), "none")
            metrics = self._service.metrics
            metrics.requests.labels(path, status, scope["state"]["model"]).inc()
            metrics.seconds.labels(path).observe(time.monotonic() - began)

    def _check(self, scope) -> None:
        headers = Headers(scope=scope)
        if self._key is not None:
            if scope["path"] not in OPEN and scope["method"] != "OPTIONS":
                self._check_key(headers)
        else:
            self._check_place(headers)
        if self._service.draining and scope["method"] == "POST":
            raise draining()

    def _check_key(self, headers: Headers) -> None:
        kind, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key)
        if kind.lower() != "bearer" or not right:
            raise ApiError(
                "the API key is missing or wrong; send Authorization: Bearer KEY", 401,
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    def _check_place(self, headers: Headers) -> None:
        host = headers.get("host")
        if host is not None and self._settings.local:
            name = host_name(host)
            if not is_loopback(name) and name != self._settings.host.lower():
                raise ApiError(
                    f"this server is asked as {shorten(repr(host))}, which is not its address; "
                    "use it, or start the server with --api-key or --host",
                    403, code="wrong_host",
                )  # fmt: skip
        origin = headers.get("origin")
        if origin is None or origin in self._settings.cors or "*" in self._settings.cors:
            return
        if host is None or urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(
                f"pages from {shorten(repr(origin))} may not ask this server; it can be started "
                "with --cors ORIGIN",
                403, code="wrong_origin",
            )  # fmt: skip


def host_name(host: str) -> str:
    """A ``Host`` header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
