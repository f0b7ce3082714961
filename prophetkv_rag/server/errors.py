"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` with the right status."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prophetkv_rag.errors import ContextWindowError, DeadlineError, InputError, StoreError

logger = logging.getLogger(__name__)

NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients try again after every 5xx and 408; this header tells them not to."""

_NAMES_OF_STATUS = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}


class ApiError(Exception):
    """An error that is the answer to a request."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind, self.param, self.code = message, status, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response itself."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def queue_full(waiting: int, retry_after_s: int) -> ApiError:
    """429: too many requests wait already."""
    message = f"{waiting} requests are waiting already; try again in about {retry_after_s} s"
    headers = {"Retry-After": str(retry_after_s)}
    return ApiError(message, status=429, kind="rate_limit_error", code="queue_full", headers=headers)


def shutting_down() -> ApiError:
    """503: the server takes no new work."""
    return ApiError("the server is shutting down", status=503, kind="server_error", code="shutting_down")


def model_not_found(asked: str, served: str) -> ApiError:
    """404: a model that is not the one served here."""
    message = f"the model {asked!r} does not exist here; this server has {served!r}"
    return ApiError(message, status=404, param="model", code="model_not_found")


def as_api_error(error: BaseException) -> ApiError:
    """Say any error as the answer to a request; what nobody foresaw is logged, and only its kind is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextWindowError):
        return ApiError(str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, InputError):
        return ApiError(str(error), code="invalid_value")
    if isinstance(error, DeadlineError):
        message = "the request's deadline passed before its answer began"
        return ApiError(message, status=504, kind="timeout_error", code="deadline_exceeded", headers=NO_RETRY)
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors())
    if isinstance(error, HTTPException):
        code = _NAMES_OF_STATUS.get(error.status_code)
        return ApiError(str(error.detail), status=error.status_code, code=code, headers=error.headers)
    logger.error("a request failed", exc_info=error)
    if isinstance(error, StoreError):
        message, code = "the store of chunk caches failed; the server's log says why", "store_failed"
        return ApiError(message, status=500, kind="server_error", code=code)
    message = f"the server failed ({type(error).__name__}); its log says where"
    return ApiError(message, status=500, kind="server_error", code="internal_error")


def _of_validation(errors: Sequence[Any]) -> ApiError:
    first = errors[0]
    message, kind = str(first["msg"]).removeprefix("Value error, "), str(first["type"])
    if kind == "json_invalid":
        return ApiError(f"the request body is not JSON: {message}", code="invalid_json")
    # What follows a field's name may be the branch of a union that was tried ("str", "list[str]").
    path = [str(part) for part in first["loc"][1:] if isinstance(part, int) or ("[" not in part and part != "str")]
    param = ".".join(path) or None
    if param is None:
        message = "the request body must be a JSON object, sent with Content-Type: application/json"
        return ApiError(message, code="invalid_json")
    return ApiError(f"{param}: {message}" if param else message, param=param, code=_code_of(kind))


def _code_of(kind: str) -> str:
    if kind == "missing":
        return "missing_required_parameter"
    return "invalid_type" if kind.endswith("_type") else "invalid_value"


class ErrorBoundary:
    """Answers what nobody foresaw, inside of all other middleware.

    Starlette answers such errors outside of it, where the answer gets no CORS headers, so that a browser hides it; and
    an application that we are mounted in would log and answer them once more.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand in front of `app`."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http" or has_begun:
                raise
            await as_api_error(error).response()(scope, receive, send)


def install_handlers(app: FastAPI) -> None:
    """Answer every error in this shape, those of the framework included."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, RequestValidationError, HTTPException, InputError, DeadlineError, StoreError, Exception):
        app.add_exception_handler(kind, handle)
