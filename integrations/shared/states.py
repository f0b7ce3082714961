"""A vector store's state: shared by two objects, and what it calls itself."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


def share_state(source: Any, target: Any, excepted: str) -> None:
    """Make of two objects one state: attributes of either are those of both, in slots or not, but for one slot."""
    for kind in type(source).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            is_private = name.startswith("__") and not name.endswith("__")
            full = f"_{kind.__name__.lstrip('_')}{name}" if is_private else name
            if full not in ("__dict__", "__weakref__", excepted) and hasattr(source, full):
                object.__setattr__(target, full, getattr(source, full))
    object.__setattr__(target, "__dict__", source.__dict__)


def own_name(store: Any) -> str | None:
    """Return what a vector store calls itself, if it has a name that stays: its collection's or table's."""
    for attribute in ("collection_name", "_collection_name", "table_name", "_table_name", "_table", "index_name"):
        value = getattr(store, attribute, None)
        if isinstance(value, str) and value:
            return f"{type(store).__name__} {value}"
    with suppress(Exception):  # a property may want more than there is
        return f"{type(store).__name__} {store._collection.name}"
    return None
