"""An OpenAI-compatible HTTP server on one engine: `create_app(engine, settings)` is an ASGI application.

In come requests in OpenAI's shapes, out go answers in the same. Begin reading with `app.py` (the routes), then
`chat.py`: `gate.py` is what a request passes first, `work_queue.py` where it waits for the model, `errors.py` how it is
refused. Needs the extra `server`. Importing this package loads neither FastAPI nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prophetkv_rag.lazy import lazily

if TYPE_CHECKING:
    from prophetkv_rag.server.app import create_app
    from prophetkv_rag.server.settings import ServerSettings

_HOME = {"ServerSettings": "prophetkv_rag.server.settings", "create_app": "prophetkv_rag.server.app"}

__all__ = ["ServerSettings", "create_app"]

__getattr__, __dir__ = lazily(__name__, _HOME)
