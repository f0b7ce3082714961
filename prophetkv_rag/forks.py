"""What becomes of locks, threads and open files when the process forks (Celery, gunicorn --preload, multiprocessing).

A child has the memory of its parent and one thread: a lock that another thread held stays held for ever, work that
was left to a thread is never done, and a descriptor keeps the parent's file locks alive. So a fork waits until no
other thread is in the middle of something (`around_fork`, `locks`), and in the child whoever had threads or open files
begins anew (`in_child`).
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeAlias, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
Lock: TypeAlias = "threading.Lock | threading.RLock"

_PLAIN_LOCK_S = 60.0
"""Longest wait for a lock that is not re-entrant: the forking thread may be who holds it, as in a signal handler."""


class Order(IntEnum):
    """Which locks are taken while others are held: those that stand first, first."""

    MODEL = 0
    CATALOG = 1
    QUEUE = 2
    MEMORY = 3


@dataclass(slots=True, eq=False)
class _Entry(Generic[T]):
    owner: weakref.ref[T]
    order: tuple[Order, int]
    locks: Sequence[str]
    before: Callable[[T], None] | None
    in_child: Callable[[T], None] | None
    is_held: bool = False


_entries: dict[int, _Entry[Any]] = {}
_numbers = itertools.count()
_one_fork = threading.Lock()  # two threads that fork would wait for each other's locks
_open: set[_Descriptor] = set()
_during: list[tuple[_Entry[Any], Any, list[Lock]]] = []


def around_fork(
    owner: T,
    *locks: str,
    order: Order = Order.MEMORY,
    before: Callable[[T], None] | None = None,
    in_child: Callable[[T], None] | None = None,
) -> None:
    """Make an object ready for forks, for as long as it lives.

    Args:
        owner: The object, which is held weakly.
        locks: Names of its attributes, each a lock or several of a kind. They are taken before a fork and released
            after it, in the parent and in the child, so that what they guard is whole in both. No thread that holds
            one may wait for the forking thread, or for a lock that stands before it.
        order: When they are taken.
        before: Called with the owner before a fork, once all locks are held; not where one could not be had.
        in_child: Called with the owner in the child, while they are still held.
    """
    number = next(_numbers)
    reference = weakref.ref(owner, lambda _: _entries.pop(number, None))
    _entries[number] = _Entry(reference, (order, number), locks, before, in_child)


@contextmanager
def kept_from_children(descriptor: int) -> Iterator[int]:
    """Close a descriptor when the block ends; a child that is forked meanwhile closes its own at once."""
    held = _Descriptor(descriptor)
    _open.add(held)
    try:
        yield descriptor
    finally:
        if held in _open:  # else this is the child, where the number may be another file's by now
            _open.discard(held)
            os.close(descriptor)


class _Descriptor:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def _before() -> None:
    _one_fork.acquire(timeout=_PLAIN_LOCK_S)
    for entry in sorted(_entries.copy().values(), key=lambda entry: entry.order):
        owner = entry.owner()
        if owner is None:
            continue
        wanted = [lock for name in entry.locks for lock in _locks_of(owner, name)]
        taken = [lock for lock in wanted if _take(lock)]
        entry.is_held = len(taken) == len(wanted)
        _during.append((entry, owner, taken))
        if not entry.is_held:
            logger.warning("forked while a lock of %s was held: the child may not be able to use it", owner)
    for entry, owner, _ in _during:
        if entry.is_held:
            _guarded(entry.before, owner)


def _locks_of(owner: Any, name: str) -> list[Lock]:
    value = getattr(owner, name)
    return [value] if hasattr(value, "acquire") else list(value)


def _take(lock: Lock) -> bool:
    return lock.acquire(timeout=-1 if isinstance(lock, _RLOCK) else _PLAIN_LOCK_S)


def _after() -> None:
    for _, _, taken in reversed(_during):
        for lock in reversed(taken):
            lock.release()
    _during.clear()
    if _one_fork.locked():
        _one_fork.release()


def _in_child() -> None:
    for held in _open:
        try:
            os.close(held.number)
        except OSError:
            logger.debug("the descriptor %d was closed already", held.number)
    _open.clear()
    for entry in list(_entries.values()):  # all, also where nobody called `_before` (servers that fork by themselves)
        owner = entry.owner()
        if owner is not None:
            _guarded(entry.in_child, owner)
    _after()


def _guarded(action: Callable[[Any], None] | None, owner: Any) -> None:
    if action is not None:
        try:
            action(owner)
        except Exception:
            logger.exception("%s was not made ready for a fork", owner)


_RLOCK = type(threading.RLock())

if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
