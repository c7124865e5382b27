"""What stands before the server: which addresses there are, how large a body may be, how many requests may wait, and
who has gone.

It speaks ASGI alone.
"""

from __future__ import annotations

import asyncio
from typing import Any

from midskip.serving.errors import ApiError, error_part, send_error
from midskip.serving.work import REQUEST, Work

ROUTES = {"/v1/completions": "POST", "/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET"}
BODY_S = 60  # for a request to arrive; it holds a place meanwhile
READ_S = 60  # for a client to read what it was sent; likewise


def _stopped() -> ApiError:
    """For requests that are cancelled: the server was told to stop, and has waited."""
    return ApiError(503, "the server was told to stop: try again", code="stopped")


class Admission:
    """Middleware around the app of transformers, some of whose addresses load other models, or drop this one.

    Args:
        max_requests: taken at once; one more is told to come again.
        max_body: bytes of a request.
    """

    def __init__(self, app: Any, max_requests: int, max_body: int):
        self.app, self.max_requests, self.max_body = app, max_requests, max_body
        self.num_requests = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            method = self._method(scope)
        except ApiError as error:
            return await send_error(send, error)
        if method == "GET":
            return await self.app(scope, receive, send)
        self.num_requests += 1
        try:
            await self._post(scope, receive, send)
        finally:
            self.num_requests -= 1

    def _method(self, scope: dict[str, Any]) -> str:
        path, method = scope["path"], scope["method"]
        if path not in ROUTES:
            raise ApiError(404, f"there is no {path!r}: this server has {', '.join(ROUTES)}", code="unknown_url")
        if method != ROUTES[path]:
            raise ApiError(405, f"{path} is for {ROUTES[path]}, and this was {method}", code="method_not_allowed")
        return method

    async def _post(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        try:
            if self.num_requests > self.max_requests:
                told = f"{self.max_requests} requests are running or waiting, and no more are taken: try again"
                raise ApiError(503, told, code="overloaded")
            body = await asyncio.wait_for(self._body(scope, receive), BODY_S)
        except ApiError as error:
            return await send_error(send, error)
        except TimeoutError:
            told = f"the request has not arrived in {BODY_S} seconds: send it again"
            return await send_error(send, ApiError(408, told, code="request_timeout"))
        except asyncio.CancelledError:
            return await send_error(send, _stopped())
        if body is None:
            return
        work, given, gone = Work(), [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()
        del body  # an answer may take long
        has_begun = False

        async def send_on(message: dict[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            try:
                async with asyncio.timeout(READ_S):
                    await send(message)
            except TimeoutError:
                leave()
                raise

        def leave() -> None:
            work.gone.set()
            gone.set()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            leave()

        async def receive_again() -> dict[str, Any]:
            if given:
                return given.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        REQUEST.set(work)
        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, receive_again, send_on)
        except asyncio.CancelledError:
            if has_begun:  # a stream
                await send({"type": "http.response.body", "body": error_part(_stopped()).encode("ascii")})
            else:
                await send_error(send, _stopped())
        except Exception:
            if not gone.is_set():  # else nobody is there to be told
                raise
        finally:
            work.gone.set()  # whatever still generates for it ends
            watcher.cancel()

    async def _body(self, scope: dict[str, Any], receive: Any) -> bytes | None:
        """All of it; None if the client went away meanwhile."""
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        parts, size = [], 0
        if told.isdigit() and int(told) > self.max_body:
            raise self._too_large()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.max_body:,} bytes: send less", code="body_too_large")
