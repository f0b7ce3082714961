"""A plain generator as an async one, without ever blocking the event loop."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_END: Any = object()


async def iterate_in_thread(
    items: Generator[T, None, None], *, on_leave: Callable[[], None] | None = None
) -> AsyncGenerator[T, None]:
    """Yield the items of a blocking generator, computing each one in a worker thread only when it is asked for.

    The generator has a thread of its own rather than the loop's shared pool: a pool full of calls that wait for the
    engine could otherwise never run the step that lets the engine go. However the consumer leaves (to the end,
    `aclose()`, cancellation, an exception), the generator is closed, after the one step that may still be running;
    nobody waits for that step, so cancellation is immediate. `on_leave` is called first: it may hasten that step's end.
    """
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()  # trace ids and tags reach the generator

    def step() -> Any:
        return context.run(next, items, _END)

    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prophetkv-stream")
    try:
        while (item := await loop.run_in_executor(worker, step)) is not _END:
            yield item
    finally:
        if on_leave is not None:
            on_leave()
        worker.submit(context.run, items.close)
        worker.shutdown(wait=False)


async def last_item(items: Generator[T, None, None], *, on_leave: Callable[[], None] | None = None) -> T:
    """Run a blocking generator to its end in a thread and return its last item; cancellation closes it.

    Raises:
        ValueError: If the generator yields nothing.
    """
    last = _END
    stream = iterate_in_thread(items, on_leave=on_leave)
    try:
        async for item in stream:
            last = item
    finally:
        await stream.aclose()
    if last is _END:
        msg = "the generator yielded nothing"
        raise ValueError(msg)
    return last
