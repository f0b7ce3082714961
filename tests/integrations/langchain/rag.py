"""What the LangChain tests share: embeddings without a model, stores on the small corpus, a log of model calls."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from zlib import crc32

import chromadb
import numpy as np
from chromadb.errors import NotFoundError
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.outputs import LLMResult

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.langchain import ProphetKVChroma
from tests.integrations.rag import TEXTS

TOWN = (TEXTS[0].replace("; ", ";\n"), TEXTS[1].replace(", and", ",\nand"), *TEXTS[2:])
"""Two of the texts have a line break, which Python source would escape."""


class HashingEmbeddings(Embeddings):
    """Bag of words, hashed into 256 dimensions: deterministic, and similar texts are near."""

    def embed_query(self, text: str) -> list[float]:
        vector = np.full(256, 1e-3)
        for word in re.findall(r"\w+", text.lower()):
            vector[crc32(word.encode()) % 256] += 1.0
        return [float(x) for x in vector / np.linalg.norm(vector)]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


class CallLog(BaseCallbackHandler):
    """Keeps the report of every finished model call, as callbacks find it."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.prompts: list[str] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.prompts.extend("\n".join(str(message.content) for message in batch) for batch in messages)

    def on_llm_start(self, serialized: Any, prompts: list[str], **kwargs: Any) -> None:
        self.prompts.extend(prompts)

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        for generations in response.generations:
            generation: Any = generations[0]
            info = (
                generation.message.response_metadata if hasattr(generation, "message") else generation.generation_info
            )
            self.reports.append(info["prophetkv"])

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The chunks of all calls."""
        return [chunk for report in self.reports for chunk in report["chunks"]]


def new_store(engine: ProphetKVEngine, texts: Sequence[str] = (), **metadata: Any) -> ProphetKVChroma:
    """A store on a collection that no other test uses."""
    store = ProphetKVChroma(
        f"test-{uuid.uuid4().hex}", HashingEmbeddings(), client=chromadb.EphemeralClient(), engine=engine
    )
    if texts:
        store.add_documents(
            [Document(page_content=text, metadata={"n": i, **metadata}) for i, text in enumerate(texts)]
        )
    return store


def town_store(engine: ProphetKVEngine) -> ProphetKVChroma:
    """The four texts."""
    return new_store(engine, TOWN, source="town.md")


@contextmanager
def own_collection() -> Iterator[None]:
    """Chroma's in-memory collections are a process's, and examples write to the one of LangChain's default name."""

    def delete() -> None:
        with suppress(NotFoundError):
            chromadb.EphemeralClient().delete_collection("langchain")

    delete()
    try:
        yield
    finally:
        delete()
