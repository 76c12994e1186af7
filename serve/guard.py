"""The guard: caps the body of a request, names every request, and turns what nobody caught into JSON."""

import logging
import secrets
import traceback

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.openai_api import ApiError

log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware round the whole application.

    Args:
        app: What it guards.
        max_body_bytes: A longer body is refused with 413, announced or not.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, started, read = Headers(scope=scope), False, 0
        named = headers.get("x-request-id", "")  # by Ray's proxy, which answers with it too
        request_id = named or secrets.token_hex(16)

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not named:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        async def counted_receive() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise HTTPException(413)
            return message

        try:
            if headers.get("content-length", "0").isdecimal() and self.too_long(headers):
                await too_large(self.max_body_bytes).response()(scope, receive, guarded_send)
            else:
                await self.app(scope, counted_receive, guarded_send)
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("request %r failed: %s\n%s", request_id[:64], type(error).__name__, frames)
            if started:
                raise
            await internal_error(request_id).response()(scope, receive, guarded_send)

    def too_long(self, headers: Headers) -> bool:
        """Whether the announced body is."""
        return int(headers.get("content-length", "0")[:20]) > self.max_body_bytes


def too_large(limit: int) -> ApiError:
    """What a request with too long a body is told."""
    return ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")


def internal_error(request_id: str) -> ApiError:
    """What a request is told that found a fault of ours: nothing of the inside, but how to find it."""
    return ApiError(500, f"internal error; the server's log has it as {request_id}", code="internal_error")
