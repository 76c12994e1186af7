"""The guard: limits the body of a request, gives every request an id, turns uncaught errors into JSON."""

import asyncio
import logging
import secrets
import traceback
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.openai_api import ApiError

log = logging.getLogger(__name__)


class Limits(NamedTuple):
    """Of one request."""

    timeout_s: float
    """Longest time until it is answered."""
    max_body_bytes: int
    """A longer body is refused with 413, announced or not."""
    body_s: float
    """Seconds after which a body that is not complete is refused with 408."""


class Guard:
    """ASGI middleware round the whole application `app`."""

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), False
        named = headers.get("x-request-id", "")  # by Ray's proxy, which adds it to the response
        request_id = named or secrets.token_hex(16)

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not named:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, self.within_limits(receive, headers), guarded_send)
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("request %r failed: %s\n%s", request_id[:64], type(error).__name__, frames)
            if started:
                raise
            await internal_error(request_id).response()(scope, receive, guarded_send)

    def within_limits(self, receive: Receive, headers: Headers) -> Receive:
        """The messages of one request, as long as its body is within the limits.

        Raises:
            HTTPException: 413 or 408, out of the call that passes a limit.
        """
        read, announced = 0, headers.get("content-length", "0")
        too_long = announced.isdecimal() and int(announced[:20]) > self.limits.max_body_bytes
        until: float | None = asyncio.get_running_loop().time() + self.limits.body_s

        async def limited() -> Message:
            nonlocal read, until
            if too_long:
                raise HTTPException(413)
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408) from None
            read += len(message.get("body", b""))
            if read > self.limits.max_body_bytes:
                raise HTTPException(413)
            if not message.get("more_body"):  # later calls wait for the client to go
                until = None
            return message

        return limited


def too_large(limit: int) -> ApiError:
    """What a request with too long a body is told."""
    return ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")


def too_slow(limit_s: float) -> ApiError:
    """What a request is told whose body does not arrive; not to retry, as it would wait as long again."""
    told = f"the body is not here after {limit_s:g} s; send all of it at once"
    return ApiError(408, told, code="body_too_slow", headers={"x-should-retry": "false"})


def internal_error(request_id: str) -> ApiError:
    """What a request is told that met a bug of ours: no internals, but the id to find it in the log."""
    return ApiError(500, f"internal error; the server's log has it as {request_id}", code="internal_error")
