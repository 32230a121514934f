"""Errors as OpenAI's protocol writes them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from jlora.system.errors import one_line

#: What ``type`` says, by status; others below 500 are errors of the request.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
MOST_CHARACTERS = 1000  # of a message, which may quote what the client sent
#: Of errors that the same request will give again; OpenAI's clients obey it.
NO_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """A request that is refused, or failed.

    Args:
        message: what is wrong, and what to do.
        status: of HTTP.
        param: the field that is wrong, or None.
        code: a word for programs, or None.
        headers: further headers of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """What the client gets, as JSON."""
        kind = TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        # Half a surrogate pair may come with a quoted name, and cannot be sent.
        message = one_line(self).encode("utf-8", "replace").decode()[:MOST_CHARACTERS]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def internal() -> ApiError:
    """What a client hears of a fault of ours: nothing of the inside."""
    return ApiError("the server failed at this; its log says why", 500, code="internal_error")


def draining() -> ApiError:
    return ApiError(
        "the server ends and takes no more requests", 503, code="shutting_down",
        headers={"retry-after": "5", "connection": "close"},
    )  # fmt: skip
