"""What a request passes before anything else sees it: the API key, a place if it is large, the size of its body.

A plain ASGI middleware: those built on Starlette's `BaseHTTPMiddleware` hide a client that goes away.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prophetkv_rag.server.errors import ApiError

OPEN_PATHS = ("/health",)
"""Answered without a key, for whoever watches whether the server is up."""

TRANSFERS = "/v1/conversations"
"""Whose bodies, both ways, are as long as a conversation's rows."""
_MOST_TRANSFERS = 2

_DRAINED_TIMES = 8
"""A body that is too long is read and dropped, up to so many limits: most clients look for an answer only then."""


class Gate:
    """Lets a request through to the application, or answers 401 or 413."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], max_body_bytes: int, max_transfer_bytes: int) -> None:
        """Stand in front of `app`; no check of keys if there are none."""
        self.app = app
        # Digests have one length, so comparing them tells nothing about a key's.
        self._digests = [_digest(key) for key in api_keys]
        self._max_body_bytes, self._max_transfer_bytes = max_body_bytes, max_transfer_bytes
        self._num_transfers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), _route_path(scope)
        is_transfer = path == TRANSFERS and scope["method"] != "DELETE"
        try:
            self._check_key(path, headers)
            if is_transfer and self._num_transfers == _MOST_TRANSFERS:
                raise _no_place()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self._num_transfers += is_transfer
        try:
            limit = self._max_transfer_bytes if is_transfer else self._max_body_bytes
            body = await self._read_body(headers, receive, limit)
            if body is not None:
                replay = _replay(body, receive)
                del body
                await self.app(scope, replay, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        finally:
            self._num_transfers -= is_transfer

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._digests or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, whichever matches
        if scheme.lower() == "bearer" and any(matches):
            return
        message = (
            "the API key is wrong"
            if scheme
            else "this server wants an API key: send it in the header `Authorization: Bearer KEY`"
        )
        raise ApiError(message, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read_body(self, headers: Headers, receive: Receive, limit: int) -> bytes | None:
        """Return the body, or `None` if the client went away while sending it."""
        announced, drained = headers.get("content-length", "0"), _DRAINED_TIMES * self._max_body_bytes
        is_too_long = announced.isdigit() and int(announced) > limit
        if is_too_long and int(announced) > drained:
            raise _too_long(limit)
        parts, size, is_whole = list[bytes](), 0, False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            is_whole = not message.get("more_body", False)
            if size > limit:
                is_too_long = True
                parts.clear()
                if size > drained:
                    break
            elif not is_too_long:
                parts.append(part)
        if is_too_long:
            raise _too_long(limit)
        return b"".join(parts)


def _too_long(limit: int) -> ApiError:
    message = f"the request body is longer than {limit} bytes; send less at once"
    return ApiError(message, status=413, code="request_too_large", headers={"Connection": "close"})


def _no_place() -> ApiError:
    message = f"{_MOST_TRANSFERS} conversations are being saved or loaded already; try again in about 1 s"
    headers = {"Retry-After": "1"}
    return ApiError(message, status=429, kind="rate_limit_error", code="queue_full", headers=headers)


def _route_path(scope: Scope) -> str:
    """Return the path that our routes see: without the prefix we are mounted under, or a proxy serves us under.

    It must read a scope as Starlette's router does: a path that the router takes for another one than `/health` must
    not pass without a key.
    """
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    rest = path.removeprefix(root)
    return rest if root and path.startswith(root) and rest[:1] in ("", "/") else path


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already, then what really comes: the client going away."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
