"""LangChain: a chat model, a completion model and a Chroma store that reuse the KV caches of retrieved chunks.

Begin reading with `chat.py` and `settings.py`; `messages.py` makes of LangChain's messages what the engine takes,
`tool_calls.py` and `structured.py` are calls of tools and JSON, `middleware.py` is retrieval for agents.
`vector_store.py` is index time with Chroma, `kv_caches.py` with any vector store.
"""

from typing import TYPE_CHECKING

from prophetkv_rag.extras import needs
from prophetkv_rag.lazy import lazily

with needs("langchain", "langchain_core", "langchain_chroma", what="prophetkv_rag.integrations.langchain"):
    from prophetkv_rag.integrations.langchain.chat import ChatProphetKV
    from prophetkv_rag.integrations.langchain.embedding import MiniLMEmbeddings
    from prophetkv_rag.integrations.langchain.kv_caches import with_kv_caches
    from prophetkv_rag.integrations.langchain.llm import ProphetKVLLM
    from prophetkv_rag.integrations.langchain.vector_store import ProphetKVChroma

if TYPE_CHECKING:
    from prophetkv_rag.integrations.langchain.middleware import RetrievalMiddleware

__all__ = [
    "ChatProphetKV",
    "MiniLMEmbeddings",
    "ProphetKVChroma",
    "ProphetKVLLM",
    "RetrievalMiddleware",
    "with_kv_caches",
]

# Agents are another package of LangChain's, which chains do not need.
__getattr__, __dir__ = lazily(__name__, {"RetrievalMiddleware": "prophetkv_rag.integrations.langchain.middleware"})
