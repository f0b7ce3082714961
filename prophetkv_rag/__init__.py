"""Reuse the KV caches of retrieved chunks, so that RAG with a local model answers several times sooner.

Importing this package loads neither torch nor a framework; names are resolved on first use. It has torch's threads
sleep while they wait, where torch is not loaded yet and the environment does not say otherwise (`waiting.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prophetkv_rag.lazy import lazily
from prophetkv_rag.waiting import wait_asleep

if TYPE_CHECKING:
    from prophetkv_rag.config import ProphetKVConfig
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.errors import (
        ContextWindowError,
        DeadlineError,
        InputError,
        ProphetKVError,
        StoreError,
        UnknownModelError,
        UnsupportedModelError,
    )
    from prophetkv_rag.generation import GenerationResult, Grammar, StreamChunk
    from prophetkv_rag.prompt import Prompt
    from prophetkv_rag.report import ReuseReport
    from prophetkv_rag.reuse import PrefillResult

__version__ = "0.1.0"

wait_asleep()

_HOME = {
    "ContextWindowError": "prophetkv_rag.errors",
    "DeadlineError": "prophetkv_rag.errors",
    "GenerationResult": "prophetkv_rag.generation.decode",
    "Grammar": "prophetkv_rag.generation.grammar",
    "InputError": "prophetkv_rag.errors",
    "PrefillResult": "prophetkv_rag.reuse.prefill",
    "Prompt": "prophetkv_rag.prompt.prompt",
    "ProphetKVConfig": "prophetkv_rag.config",
    "ProphetKVEngine": "prophetkv_rag.engine",
    "ProphetKVError": "prophetkv_rag.errors",
    "ReuseReport": "prophetkv_rag.report.report",
    "StoreError": "prophetkv_rag.errors",
    "StreamChunk": "prophetkv_rag.generation.decode",
    "UnknownModelError": "prophetkv_rag.errors",
    "UnsupportedModelError": "prophetkv_rag.errors",
}

__all__ = [
    "ContextWindowError",
    "DeadlineError",
    "GenerationResult",
    "Grammar",
    "InputError",
    "PrefillResult",
    "Prompt",
    "ProphetKVConfig",
    "ProphetKVEngine",
    "ProphetKVError",
    "ReuseReport",
    "StoreError",
    "StreamChunk",
    "UnknownModelError",
    "UnsupportedModelError",
]

__getattr__, __dir__ = lazily(__name__, _HOME)
