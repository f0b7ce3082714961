"""What the integration tests share: an embedding without a model, a small corpus, and a log of every model call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMCompletionEndEvent,
    LLMPredictEndEvent,
    LLMPredictStartEvent,
)

from prophetkv_rag.engine import ProphetKVEngine

TEXTS = (
    "The old harbour of Marsala never closes at all; people watch the boats from the river bank every night.",
    "The museum opens at ten o'clock on Monday, and the library beside it opens at nine o'clock every day.",
    "In 1942 the factory shall produce 60,000 planes, 45,000 tanks and 20,000 guns for the United States.",
    "Nothing is so hard that it cannot be said simply: the quick brown fox jumps over the lazy dog.",
)
QUESTION = "When does the museum open, and when the library?"


class HashingEmbedding(BaseEmbedding):
    """Bag of words, hashed into 256 dimensions: deterministic, and similar texts are near."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = np.full(256, 1e-3)
        for word in re.findall(r"\w+", text.lower()):
            vector[crc32(word.encode()) % 256] += 1.0
        return [float(x) for x in vector / np.linalg.norm(vector)]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


class CallLog(BaseEventHandler):
    """Keeps the end event of every model call, and the start and end events of template calls."""

    calls: list[LLMChatEndEvent | LLMCompletionEndEvent] = Field(default_factory=list)
    predictions: list[LLMPredictStartEvent | LLMPredictEndEvent] = Field(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, (LLMChatEndEvent, LLMCompletionEndEvent)):
            self.calls.append(event)
        if isinstance(event, (LLMPredictStartEvent, LLMPredictEndEvent)):
            self.predictions.append(event)

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The chunks of all calls, as reported in `raw`."""
        return [chunk for call in self.calls for chunk in call.response.raw["chunks"]]


def chunk_key(engine: ProphetKVEngine, text: str) -> str:
    """The cache key that `text` has as a chunk."""
    ids = engine.tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return engine.identity.key(ids)


def build_index(vector_store: Any, texts: Sequence[str] = TEXTS, **metadata: Any) -> VectorStoreIndex:
    """Index the texts by LlamaIndex's own code, one document and one chunk each."""
    documents = [Document(text=text, id_=f"doc-{i}", metadata=metadata) for i, text in enumerate(texts)]
    storage = StorageContext.from_defaults(vector_store=vector_store)
    return VectorStoreIndex.from_documents(documents, storage_context=storage, embed_model=HashingEmbedding())
