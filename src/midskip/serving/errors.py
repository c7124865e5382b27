"""Errors in the shape that clients of OpenAI's API expect."""

from __future__ import annotations

import json
from typing import Any


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
        status: of HTTP.
        message: what was wrong, and what to do.
        param: the field of the request that it is about, if it is one.
        code: a word that programs go by.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_body(error: ApiError) -> str:
    """JSON, in ASCII: what a client sent and the message repeats need not be Unicode text."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    told = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return json.dumps({"error": told})


def error_part(error: ApiError) -> str:
    """The same in a stream of server-sent events."""
    return f"data: {error_body(error)}\n\n"


def as_api_error(error: BaseException) -> ApiError:
    """Of what FastAPI, transformers or a model raised."""
    if isinstance(error, ApiError):
        return error
    status = getattr(error, "status_code", None)
    if isinstance(status, int):  # HTTPException
        return ApiError(status, str(getattr(error, "detail", error)))
    if type(error).__name__ == "RequestValidationError":
        return ApiError(400, "the body is not a JSON object: send one, with content-type application/json")
    return ApiError(500, f"the model could not go on: {error}")


async def send_error(send: Any, error: ApiError) -> None:
    """Answer by ASGI alone."""
    body = error_body(error).encode("ascii")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
