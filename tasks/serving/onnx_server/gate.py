"""What every request passes before a path answers it: the end of the server, the API key, the size of the body."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RequestError
from .metrics import Metrics
from .scheduler import RETRY_AFTER

OPEN = frozenset({"/health"})  # answered without a key


class Gate:
    """ASGI middleware. keys: accepted API keys; empty: none is asked for. max_body: bytes."""

    def __init__(
        self, app: ASGIApp, keys: tuple[str, ...], max_body: int, paths: Iterable[str], metrics: Metrics
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._max_body = max_body
        self._paths = frozenset(paths)
        self._metrics = metrics
        self.closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except RequestError as error:
            headers = {**error.headers, "Connection": "close"}  # the rest of the body is not read
            await JSONResponse(error.body(), error.status, headers)(scope, receive, counted)
            return
        except ConnectionResetError:
            return
        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, counted)

    def _check(self, scope: Scope) -> None:
        if self.closing:
            raise RequestError(503, "the server is shutting down", headers={"Retry-After": RETRY_AFTER})
        if not self._keys or scope["path"] in OPEN:
            return
        kind, _, key = _header(scope, b"authorization").partition(b" ")
        # all are compared, so that the time says nothing about the key
        same = [hmac.compare_digest(key.strip(), one) for one in self._keys]
        if kind.lower() != b"bearer" or not any(same):
            raise RequestError(
                401,
                "no valid API key; send the header Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. RequestError if it is too large; ConnectionResetError if the client is gone."""
        declared = _header(scope, b"content-length")
        if declared.isdigit() and int(declared) > self._max_body:
            raise self._too_large()
        body = bytearray()
        while True:
            message: MutableMapping[str, Any] = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            body += message.get("body", b"")
            if len(body) > self._max_body:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the request's body is larger than {self._max_body} bytes; shorten it")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")
