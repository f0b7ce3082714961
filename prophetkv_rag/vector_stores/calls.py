"""A call on a vector store, with what happens to the caches before and after it: for plain calls and awaited ones."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.vector_stores.document_order import Record

if TYPE_CHECKING:
    from prophetkv_rag.vector_stores.link import StoreLink, Writing

T = TypeVar("T")

logger = logging.getLogger(__name__)

THREAD_NAME = "prophetkv-vector-store"

_inside: ContextVar[frozenset[int]] = ContextVar("prophetkv_inside_a_vector_store", default=frozenset())


class Change(Protocol):
    """What one call does to the records."""

    def begin(self) -> None:
        """Before the call."""

    def done(self, result: Any) -> None:
        """After it, with what it returned."""

    def failed(self) -> None:
        """After it has raised, or `begin` was interrupted; never raises."""


class Write:
    """Records are written.

    Args:
        link: The vector store's.
        records: What is written; an id is "" where the vector store gives one.
        names: Makes of the call's result the records' ids; `None` where they are known.
        after: Called when the records are there.
    """

    def __init__(
        self,
        link: StoreLink,
        records: Sequence[Record],
        names: Callable[[Any], Sequence[str] | None] | None = None,
        *,
        after: Callable[[], None] | None = None,
    ) -> None:
        self.link = link
        self.records = records
        self.names = names
        self.after = after
        self._writing: Writing | None = None

    def begin(self) -> None:
        """See `Change.begin`."""
        self._writing = self.link.begin(self.records)

    def done(self, result: Any) -> None:
        """See `Change.done`."""
        assert self._writing is not None
        self.link.commit(self._writing, self.names(result) if self.names is not None else None)
        if self.after is not None:
            self.after()

    def failed(self) -> None:
        """See `Change.failed`."""
        if self._writing is not None:
            self.link.settle(self._writing)


class Delete:
    """Records are deleted.

    Args:
        link: The vector store's.
        names: Finds their ids, before the call; `None` where only the vector store can tell.
        is_sure: Whether all of them are gone once the call has returned; else it is looked at.
        after: Called when the records are gone.
    """

    def __init__(
        self,
        link: StoreLink,
        names: Callable[[], Sequence[str]] | None,
        *,
        is_sure: Callable[[Any], bool] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        self.link = link
        self.after = after
        self.names = names
        self.is_sure = is_sure or (lambda _: True)
        self._found: Sequence[str] | None = None
        self._has_begun = False

    def begin(self) -> None:
        """See `Change.begin`."""
        try:
            self._found = None if self.names is None else self.names()
        except StoreError as error:  # no reason not to delete: it is looked at afterwards
            self.link.engine.store.failures.note(error)
        self._has_begun = True

    def done(self, result: Any) -> None:
        """See `Change.done`."""
        if self._found is not None and self.is_sure(result):
            self.link.forget(self._found)
        else:
            self.link.forget_missing(self._found)
        if self.after is not None:
            self.after()

    def failed(self) -> None:
        """See `Change.failed`."""
        if self._has_begun:
            try:
                self.link.forget_missing(self._found)
            except Exception:  # the first error is the one to show
                logger.warning("caches of a failed delete from %s may be left over", self.link.label, exc_info=True)


class Renewal:
    """Anything may have changed: all of it is looked at after the call."""

    def __init__(self, link: StoreLink) -> None:
        self.link = link

    def begin(self) -> None:
        """See `Change.begin`."""

    def done(self, result: Any) -> None:
        """See `Change.done`."""
        try:
            self.link.cache_existing()
        except InputError as error:  # the call went through
            logger.warning("caches of %s may not be what its records are: %s", self.link.label, error)

    def failed(self) -> None:
        """See `Change.failed`."""


def is_inside(link: StoreLink) -> bool:
    """Whether this runs within a call on the link's vector store, which knows already what becomes of the caches."""
    return id(link) in _inside.get()


def run(link: StoreLink, change: Change, call: Callable[[], T]) -> T:
    """Call, with the caches kept in step."""
    with link.lock.held():
        try:
            change.begin()
            with _marked(link):
                result = call()
        except BaseException:
            change.failed()
            raise
        change.done(result)
    return result


async def arun(link: StoreLink, change: Change, call: Callable[[], Awaitable[T]]) -> T:
    """Await a call, with the caches kept in step; what computes or reads is done in a thread.

    A cancelled caller waits until the part at work is through, so that nothing is left half done.
    """
    async with link.lock.aheld():
        try:
            await _in_thread(change.begin)
            with _marked(link):
                result = await call()
        except BaseException:
            await _in_thread(change.failed)
            raise
        await _in_thread(lambda: change.done(result))
    return result


async def arun_alone(link: StoreLink, action: Callable[[], T]) -> T:
    """Do something of our own in a thread, while nobody else changes records."""
    async with link.lock.aheld():
        return await _in_thread(action)


@contextmanager
def _marked(link: StoreLink) -> Iterator[None]:
    token = _inside.set(_inside.get() | {id(link)})
    try:
        yield
    finally:
        _inside.reset(token)


async def _in_thread(action: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, but a cancelled caller waits for the thread.

    The thread is one of its own: those of the loop's pool may all be waiting for the lock that is held here.
    """
    context = contextvars.copy_context()
    with_one = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
    future = asyncio.get_running_loop().run_in_executor(with_one, lambda: context.run(action))
    with_one.shutdown(wait=False)
    is_cancelled = False
    while True:
        try:
            result = await asyncio.shield(future)
            break
        except asyncio.CancelledError:
            if future.cancelled():
                raise
            is_cancelled = True
    if is_cancelled:
        raise asyncio.CancelledError
    return result
