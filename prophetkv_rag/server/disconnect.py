"""Noticing that a client has gone away while we work for it.

Only `receive` tells: uvicorn drops what is sent to a closed connection without an error, and with recent releases of
Starlette a `StreamingResponse` goes on writing into nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work` while the client is there. The request's body must have been read.

    Raises:
        ClientDisconnect: If the client goes away first; `work` is cancelled then.
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events that end when the client goes away; `on_close` is called however they end."""

    def __init__(self, events: AsyncIterator[str], *, on_close: Callable[[], None]) -> None:
        # The last header keeps nginx from collecting the pieces of an answer.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await unless_disconnected(receive, self.stream_response(send))
        except ClientDisconnect:
            pass
        finally:
            self._on_close()
