"""A property that is computed once for each object, without a lock.

`functools.cached_property` has one before Python 3.12, which all objects of a class share: a process that is forked
while any thread computes any of them hangs at the first that it wants. Here two threads may compute a value at
once; both get the one that was there first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class once(Generic[T]):  # a decorator
    """Decorate a method without arguments; its object needs a `__dict__`, and may be frozen."""

    def __init__(self, method: Callable[[Any], T]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> once[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> once[T] | T:
        """Return the value; from the second time on it is found in the object before this is asked."""
        if instance is None:
            return self
        value: T = instance.__dict__.setdefault(self._name, self._method(instance))
        return value
