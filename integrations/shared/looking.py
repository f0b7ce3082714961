"""Searches in a vector store: the caches of what is found begin to load while the caller goes on to its prompt."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from prophetkv_rag.vector_stores import StoreLink

Found = Callable[[StoreLink, Any], Sequence[str]]
logger = logging.getLogger(__name__)

_is_looking: ContextVar[bool] = ContextVar("prophetkv_looking_in_a_vector_store", default=False)


def looking(inner: Any, found: Found, link_of: Callable[[Any], StoreLink | None]) -> Any:
    """Return a search that also begins to load caches.

    Args:
        inner: The search, plain or async.
        found: Makes of its result the keys of the chunks that it found, best first.
        link_of: Makes of the vector store its link.
    """

    def read_ahead(store: Any, result: Any) -> None:
        link = link_of(store)
        if link is None:
            return
        try:
            link.engine.library.read_ahead([found(link, result)])
        except Exception:  # the search went through; the caches are read when they are needed
            logger.debug("caches of what was found in %s are not read ahead", link.label, exc_info=True)

    if inspect.iscoroutinefunction(inner):

        @functools.wraps(inner)
        async def asearch(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _Outermost() as is_outermost:
                result = await inner(self, *args, **kwargs)
            if is_outermost:  # texts are tokenised and the catalog is asked: not on the event loop
                await asyncio.to_thread(read_ahead, self, result)
            return result

        return asearch

    @functools.wraps(inner)
    def search(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Outermost() as is_outermost:
            result = inner(self, *args, **kwargs)
        if is_outermost:
            read_ahead(self, result)
        return result

    return search


class _Outermost:
    """Whether this search is not a part of another one; also across a thread that the other one waits for."""

    def __enter__(self) -> bool:
        is_outermost = not _is_looking.get()
        self._token = _is_looking.set(True)
        return is_outermost

    def __exit__(self, *_: object) -> None:
        _is_looking.reset(self._token)
