"""What wrapping a vector store needs to know of its framework: which methods change records, and how to read them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prophetkv_rag.vector_stores import Change, StoreLink

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine


class Call:
    """The arguments of a call, by name, wherever they stand in its signature; may be changed before it is made."""

    def __init__(self, bound: inspect.BoundArguments) -> None:
        self._bound = bound
        kinds = bound.signature.parameters.values()
        rest = next((one.name for one in kinds if one.kind is inspect.Parameter.VAR_KEYWORD), None)
        self.rest: dict[str, Any] = bound.arguments.get(rest, {}) if rest is not None else {}
        """What the signature does not name."""

    def get(self, name: str) -> Any:
        """Return an argument, or `None`."""
        return self._place(name).get(name)

    def set(self, name: str, value: Any) -> None:
        """Change an argument that was given."""
        self._place(name)[name] = value

    def has(self, name: str) -> bool:
        """Whether the argument was given."""
        return name in self._place(name)

    def _place(self, name: str) -> dict[str, Any]:
        return self._bound.arguments if name in self._bound.arguments else self.rest


Builder = Callable[[StoreLink, Call], "Change | None"]
"""Says what a call does to the records; `None` where it does nothing, or where the vector store will refuse it."""


@dataclass(frozen=True, slots=True)
class Framework:
    """What is a framework's own.

    Attributes:
        base: Its class of vector stores.
        changes: Method -> what a call does.
        twins: Async method -> the plain one that the base class calls for it, on the event loop.
        searches: Method that finds records -> makes of its result their chunks' keys, best first; async ones too.
        makers: Class methods that write into the vector store that they make, maybe by other ways than its methods.
        records: Makes of a vector store, and the caller's function that reads it, what the link reads.
        restore: Makes the wrapper again from a pickle: of the plain vector store and its name.
    """

    base: type
    changes: Mapping[str, Builder]
    twins: Mapping[str, str]
    searches: Mapping[str, Callable[[StoreLink, Any], Sequence[str]]]
    makers: Sequence[str]
    records: Callable[[Any, Any], Any]
    restore: Callable[[Any, str | None], Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What belongs to one wrapped vector store or class; without an engine it can be read, and not written."""

    framework: Framework
    wrapped: type
    engine: ProphetKVEngine | None
    name: str | None
    read: Any
