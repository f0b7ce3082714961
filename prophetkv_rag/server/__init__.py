"""An OpenAI-compatible HTTP server on one engine: `create_app(engine, settings)` is an ASGI application.

Needs the extra `server`. Importing this package loads neither FastAPI nor torch; names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prophetkv_rag.server.app import create_app
    from prophetkv_rag.server.settings import ServerSettings

_HOME = {"ServerSettings": "prophetkv_rag.server.settings", "create_app": "prophetkv_rag.server.app"}

__all__ = ["ServerSettings", "create_app"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
