"""A framework's vector store, whichever it is, as an object of its own class whose writes and deletes tell the caches.

The class is made on the spot, below the vector store's own: `isinstance` holds, and every other method and attribute
is the vector store's. The object shares its state with the one that was given, so nothing is copied or opened again.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import logging
import threading
from dataclasses import replace
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.integrations.shared.framework import Builder, Call, Framework, Settings
from prophetkv_rag.integrations.shared.looking import looking
from prophetkv_rag.integrations.shared.states import own_name, share_state
from prophetkv_rag.vector_stores import Change, StoreLink, arun, arun_alone, is_inside, run, store_name

logger = logging.getLogger(__name__)


class _Guard:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        around_fork(self, "lock")


_making = _Guard()
_LINK = "_prophetkv_link"
_SETTINGS = "_prophetkv_settings"


class KVCaching:
    """What is added to a vector store's own class."""

    __slots__ = ()

    def cache_existing(self) -> None:
        """Cache what was written without this wrapper or for another model; drop caches of what is deleted since.

        Raises:
            InputError: If the vector store cannot be read and no `read=` was given.
        """
        link = _link_of(self)
        with link.lock.held():
            link.cache_existing()

    async def acache_existing(self) -> None:
        """Async twin of `cache_existing`."""
        link = _link_of(self)
        await arun_alone(link, link.cache_existing)

    def encode_behind_neighbours(self, *, refresh: bool = False) -> None:
        """Encode every text behind its nearest neighbours, where the engine's encoding is that; does what is left.

        A write does that for its own records, in a thread; this waits for it.

        Args:
            refresh: Also encode anew what stands behind others than most of its neighbours of today.

        Raises:
            InputError: If the vector store does not say what it has, or what is near.
        """
        _link_of(self).encode_behind_neighbours(refresh=refresh)

    async def aencode_behind_neighbours(self, *, refresh: bool = False) -> None:
        """Async twin of `encode_behind_neighbours`."""
        await asyncio.to_thread(_link_of(self).encode_behind_neighbours, refresh=refresh)

    def __copy__(self) -> Any:
        return _wrapper(copy.copy(_plain(self)), type(self), _link_if_any(self))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Any:
        settings, plain = _settings(self), copy.deepcopy(_plain(self), memo)
        link = _link_if_any(self)
        copied = None if link is None else link.copy(settings.framework.records(plain, link.records.given))
        return _wrapper(plain, type(self), copied)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """An engine cannot be pickled: what is unpickled reads, and needs `with_kv_caches` before it writes."""
        link = _link_if_any(self)
        name = _settings(self).name if link is None else link.name
        return _settings(self).framework.restore, (_plain(self), name)


def wrap(store_or_class: Any, settings: Settings) -> Any:
    """Return the vector store, or a class of them, with its writes and deletes followed by caches.

    Raises:
        InputError: If it is no vector store of the framework, or needs a name.
    """
    framework = settings.framework
    if isinstance(store_or_class, type):
        if not issubclass(store_or_class, framework.base):
            raise InputError(_not_one(store_or_class.__name__, framework))
        is_ours = issubclass(store_or_class, KVCaching)
        return _caching_class(getattr(store_or_class, _SETTINGS).wrapped if is_ours else store_or_class, settings)
    if not isinstance(store_or_class, framework.base):
        raise InputError(_not_one(f"an object of {type(store_or_class).__name__}", framework))
    plain = store_or_class
    if isinstance(plain, KVCaching):
        link = _link_if_any(plain)
        name = settings.name or (_settings(plain).name if link is None else link.name)
        settings = Settings(
            framework,
            settings.wrapped,
            settings.engine,
            name,
            settings.read or (None if link is None else link.records.given),
        )
        plain = _plain(plain)
    if not hasattr(plain, "__dict__"):
        msg = f"{type(plain).__name__} keeps its state where it cannot be shared, so it cannot be wrapped"
        raise InputError(msg)
    if settings.engine is None:
        return _wrapper(plain, _caching_class(type(plain), settings), None)
    # Name and `read` are this one's: others that the class's own methods make have others.
    return _wrapper(
        plain, _caching_class(type(plain), replace(settings, name=None, read=None)), _make_link(plain, settings)
    )


def _not_one(given: str, framework: Framework) -> str:
    return f"with_kv_caches got {given}; give a {framework.base.__name__} (or a class of them)"


def _caching_class(wrapped: type, settings: Settings) -> type:
    """Make the class below the vector store's own."""
    framework = settings.framework
    methods: dict[str, Any] = {"__slots__": (_LINK,), "__module__": wrapped.__module__, "__doc__": wrapped.__doc__}
    for name, builder in framework.changes.items():
        inner = getattr(wrapped, name, None)
        # What is the framework's own default calls another method, which is ours.
        if inner is not None and inner is not getattr(framework.base, name, None):
            methods[name] = _followed(inner, builder)
    for name, found in framework.searches.items():
        inner = getattr(wrapped, name, None)
        if inner is not None and inner is not getattr(framework.base, name, None):
            methods[name] = looking(inner, found, _link_if_any)
    for name, plain in framework.twins.items():
        if getattr(wrapped, name) is getattr(framework.base, name):
            methods[name] = _in_thread(getattr(wrapped, name), plain)
    made = type(wrapped)(wrapped.__name__, (KVCaching, wrapped), methods)
    for name in framework.makers:
        if hasattr(wrapped, name):
            setattr(made, name, classmethod(_maker(made, name)))
    setattr(made, _SETTINGS, Settings(framework, wrapped, settings.engine, settings.name, settings.read))
    made.__qualname__ = wrapped.__qualname__
    return made


def _followed(inner: Any, builder: Builder) -> Any:
    """Return the method with the caches kept in step; a call from within another one of ours is left alone."""
    signature = inspect.signature(inner)

    def change_of(self: Any, args: Any, kwargs: Any) -> tuple[StoreLink, Change, inspect.BoundArguments] | None:
        link = _link_of(self)
        if is_inside(link):
            return None
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:  # the method itself says best what is wrong
            return None
        change = builder(link, Call(bound))
        return None if change is None else (link, change, bound)

    if inspect.iscoroutinefunction(inner):

        @functools.wraps(inner)
        async def amethod(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = change_of(self, args, kwargs)
            if found is None:
                return await inner(self, *args, **kwargs)
            link, change, bound = found
            return await arun(link, change, lambda: inner(*bound.args, **bound.kwargs))

        return amethod

    @functools.wraps(inner)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = change_of(self, args, kwargs)
        if found is None:
            return inner(self, *args, **kwargs)
        link, change, bound = found
        return run(link, change, lambda: inner(*bound.args, **bound.kwargs))

    return method


def _in_thread(default: Any, plain: str) -> Any:
    @functools.wraps(default)
    async def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(getattr(self, plain), *args, **kwargs)

    return method


def _maker(made: type, name: str) -> Any:
    """Return a class method whose vector store has caches, also where it was filled past our methods."""
    inner = getattr(made, name).__func__

    def settle(store: Any) -> Any:
        settings: Settings = getattr(made, _SETTINGS)
        if not isinstance(store, KVCaching) and isinstance(store, settings.framework.base):
            store = wrap(store, settings)  # some name their class instead of asking which it is
        if isinstance(store, KVCaching) and not (link := _link_of(store)).num_writes:
            try:
                store.cache_existing()
            except InputError as error:
                logger.warning("what %s wrote to %s has no caches: %s", name, link.label, error)
        return store

    if inspect.iscoroutinefunction(inner):

        @functools.wraps(inner)
        async def amake(cls: type, *args: Any, **kwargs: Any) -> Any:
            store = await inner(cls, *args, **kwargs)
            return await asyncio.to_thread(settle, store)

        return amake

    @functools.wraps(inner)
    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        return settle(inner(cls, *args, **kwargs))

    return make


# ---- one state, two objects -----------------------------------------------------------------------------------------


def _wrapper(plain: Any, made: type, link: StoreLink | None) -> Any:
    wrapper: Any = object.__new__(made)
    share_state(plain, wrapper, _LINK)
    if link is not None:
        object.__setattr__(wrapper, _LINK, link)
    return wrapper


def _plain(wrapper: Any) -> Any:
    plain: Any = object.__new__(_settings(wrapper).wrapped)
    share_state(wrapper, plain, _LINK)
    return plain


def _settings(wrapper: Any) -> Settings:
    settings: Settings = getattr(type(wrapper), _SETTINGS)
    return settings


def _link_if_any(wrapper: Any) -> StoreLink | None:
    try:
        link: StoreLink | None = object.__getattribute__(wrapper, _LINK)
    except AttributeError:
        return None
    return link


def _link_of(wrapper: Any) -> StoreLink:
    link = _link_if_any(wrapper)
    return _new_link(wrapper) if link is None else link


def _new_link(wrapper: Any) -> StoreLink:
    with _making.lock:  # two threads that begin at once share one
        link = _link_if_any(wrapper)
        if link is not None:
            return link
        link = _make_link(_plain(wrapper), _settings(wrapper))
        object.__setattr__(wrapper, _LINK, link)
    return link


def _make_link(plain: Any, settings: Settings) -> StoreLink:
    if settings.engine is None:
        msg = "this vector store was unpickled, and its engine was not: with_kv_caches(store, engine) gives it one"
        raise InputError(msg)
    name = store_name(settings.name, own_name(plain), settings.engine)
    return StoreLink(settings.engine, name, settings.framework.records(plain, settings.read))
