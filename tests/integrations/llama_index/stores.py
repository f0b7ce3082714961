"""LlamaIndex's vector stores as the tests make them: empty, local, without a server, 256 dimensions."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class StoreKind:
    """One kind of vector store.

    Attributes:
        name: As in the table of docs/vector_stores.md.
        make: Makes an empty one in a directory.
        keeps_texts: Whether `cache_existing` finds the texts there; else the caller gives `read=`.
        has_modes: Whether it knows other queries than by similarity; others make that of all.
    """

    name: str
    make: Callable[[Path], Any]
    keeps_texts: bool = True
    has_modes: bool = True


def new_name() -> str:
    return f"t{uuid.uuid4().hex}"


def simple(directory: Path) -> Any:
    from llama_index.core.vector_stores import SimpleVectorStore

    return SimpleVectorStore()


def chroma(directory: Path) -> Any:
    import chromadb
    from llama_index.vector_stores.chroma import ChromaVectorStore

    client = chromadb.EphemeralClient()
    return ChromaVectorStore(chroma_collection=client.create_collection(new_name(), embedding_function=None))


def faiss(directory: Path) -> Any:
    faiss = pytest.importorskip("faiss")
    stores = pytest.importorskip("llama_index.vector_stores.faiss")
    return stores.FaissVectorStore(faiss_index=faiss.IndexFlatL2(256))


def faiss_map(directory: Path) -> Any:
    faiss = pytest.importorskip("faiss")
    stores = pytest.importorskip("llama_index.vector_stores.faiss")
    return stores.FaissMapVectorStore(faiss_index=faiss.IndexIDMap2(faiss.IndexFlatL2(256)))


def qdrant(directory: Path) -> Any:
    client = pytest.importorskip("qdrant_client")
    stores = pytest.importorskip("llama_index.vector_stores.qdrant")
    from qdrant_client.models import Distance, VectorParams

    one, name = client.QdrantClient(":memory:"), new_name()
    one.create_collection(name, vectors_config=VectorParams(size=256, distance=Distance.COSINE))
    two = client.AsyncQdrantClient(":memory:")  # with data of its own
    return stores.QdrantVectorStore(name, client=one, aclient=two)


def lancedb(directory: Path) -> Any:
    stores = pytest.importorskip("llama_index.vector_stores.lancedb")
    return stores.LanceDBVectorStore(uri=str(directory / "lance"), table_name=new_name())


def milvus(directory: Path) -> Any:
    pytest.importorskip("milvus_lite")
    stores = pytest.importorskip("llama_index.vector_stores.milvus")
    return stores.MilvusVectorStore(
        uri=str(directory / "milvus.db"), dim=256, collection_name=new_name(), consistency_level="Strong"
    )


KINDS = (
    StoreKind("`SimpleVectorStore`", simple, keeps_texts=False),
    StoreKind("`ChromaVectorStore`", chroma),
    StoreKind("`FaissVectorStore`", faiss, keeps_texts=False, has_modes=False),
    StoreKind("`FaissMapVectorStore`", faiss_map, keeps_texts=False, has_modes=False),
    StoreKind("`QdrantVectorStore`", qdrant, has_modes=False),
    StoreKind("`LanceDBVectorStore`", lancedb, has_modes=False),
    StoreKind("`MilvusVectorStore` (Milvus Lite)", milvus),
)
