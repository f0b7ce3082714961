"""LangChain models and stores that reuse the KV caches of retrieved chunks: `prophetkv_rag.integrations.langchain`."""

from prophetkv_rag.integrations import langchain as _ours
from prophetkv_rag.integrations.langchain import (
    ChatProphetKV,
    MiniLMEmbeddings,
    ProphetKVChroma,
    ProphetKVLLM,
    with_kv_caches,
)

__all__ = [
    "ChatProphetKV",
    "MiniLMEmbeddings",
    "ProphetKVChroma",
    "ProphetKVLLM",
    "RetrievalMiddleware",
    "with_kv_caches",
]


def __getattr__(name: str) -> object:
    if name == "RetrievalMiddleware":  # needs the package langchain, which chains do not
        return _ours.RetrievalMiddleware
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted(__all__)
