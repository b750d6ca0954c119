"""Errors that the server reports, in the form of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class StartError(Exception):
    """The server cannot start: the message says what was found, what was expected and what to do."""


class RequestError(Exception):
    """A request that is refused. param: the field that is wrong."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer's JSON. What UTF-8 cannot encode is replaced."""
        message = self.message.encode("utf-8", errors="replace").decode()
        return {"error": {"message": message, "type": _kind(self.status), "param": self.param, "code": self.status}}


def _kind(status: int) -> str:
    known = {401: "AuthenticationError", 404: "NotFoundError", 413: "RequestTooLargeError"}
    if status in known:
        return known[status]
    return "BadRequestError" if status < 500 else "ServiceUnavailableError" if status == 503 else "InternalServerError"
