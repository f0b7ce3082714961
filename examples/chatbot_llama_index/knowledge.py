"""The chatbot's documents: read, split, embedded into Chroma, each chunk with its KV cache.

All of it is LlamaIndex's and Chroma's own code; `ProphetKVChromaVectorStore` computes a chunk's cache when it is
written and drops it when it is deleted.
"""

from __future__ import annotations

import hashlib
import io
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import chromadb
from llama_index.core import Document, VectorStoreIndex, set_global_tokenizer
from llama_index.core.node_parser import SentenceSplitter

from prophetkv_rag.chroma import open_store
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index import MiniLMEmbedding, ProphetKVChromaVectorStore
from prophetkv_rag.text import decode_text, shown_name, well_formed

CHUNK_TOKENS = 256
NODES_PER_WRITE = 8
MAX_BYTES = 5_000_000
MAX_DOCUMENTS = 500
TEXT_SUFFIXES = (".md", ".txt")

logger = logging.getLogger(__name__)


def allowed_suffixes() -> tuple[str, ...]:
    """What can be read: text and Markdown, and PDF where pypdf is installed."""
    try:
        import pypdf  # noqa: F401
    except ImportError:
        return TEXT_SUFFIXES
    return (*TEXT_SUFFIXES, ".pdf")


def check_name(name: str) -> str:
    """Return a document's name, or raise `InputError` if it is not a plain file name of a type that can be read."""
    is_plain = name == PurePosixPath(name).name and not name.startswith(".") and "\\" not in name and name.isprintable()
    if not name or len(name) > 120 or not is_plain:
        msg = "That is not a plain file name. Use at most 120 characters, without slashes, and no dot in front."
        raise InputError(msg)
    suffix = Path(name).suffix.lower()
    if suffix not in allowed_suffixes():
        hint = " (PDF too, once pypdf is installed: pip install pypdf)" if suffix == ".pdf" else ""
        msg = f"“{name}” cannot be read. Allowed: {', '.join(allowed_suffixes())}{hint}."
        raise InputError(msg)
    return name


def read_text(name: str, content: bytes) -> str:
    """Return a file's text; raises `InputError` with a message for people."""
    if len(content) > MAX_BYTES:
        msg = f"“{name}” is larger than {MAX_BYTES // 1_000_000} MB, which is the most this chat takes."
        raise InputError(msg)
    if name.lower().endswith(".pdf"):
        text = well_formed(_pdf_text(content))  # damaged fonts give half characters
    else:
        try:
            text = decode_text(content)
        except InputError as error:
            msg = f"“{name}” holds no text that can be read: {error}."
            raise InputError(msg) from None
    if "\0" in text or not text.strip():
        msg = f"“{name}” holds no text."
        raise InputError(msg)
    return text.replace("\r\n", "\n")


def _pdf_text(content: bytes) -> str:
    from pypdf import PdfReader

    try:
        return "\n\n".join(page.extract_text() for page in PdfReader(io.BytesIO(content)).pages)
    except Exception as error:  # whatever a broken PDF makes of the parser
        msg = "That PDF cannot be read; it may be damaged or protected."
        raise InputError(msg) from error


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as the page lists it; `nbytes` is the size of its KV caches."""

    id: str
    name: str
    chunks: int
    nbytes: int


class Knowledge:
    """The indexed documents. Safe to use from several threads; one writes at a time."""

    def __init__(self, model: str | Path, directory: Path) -> None:
        """Open the database at `directory`, or make it; the model is loaded first."""
        client = chromadb.PersistentClient(str(directory), settings=chromadb.Settings(anonymized_telemetry=False))
        self.engine = ProphetKVEngine.from_pretrained(model, store=open_store(client))
        self.store = ProphetKVChromaVectorStore.from_client(
            client, "documents", self.engine, metadata={"hnsw:space": "cosine"}
        )
        self.index = VectorStoreIndex.from_vector_store(self.store, embed_model=MiniLMEmbedding())
        self._splitter = SentenceSplitter(chunk_size=CHUNK_TOKENS, chunk_overlap=0, tokenizer=self._token_ids)
        set_global_tokenizer(self._token_ids)  # what LlamaIndex counts tokens with
        self._lock = threading.Lock()
        self.store.client.cache_existing()  # another model since last time, or caches that were deleted

    def _token_ids(self, text: str) -> list[int]:
        return self.engine.library.tokens.chunk(text)  # locked; safe from several threads

    def documents(self) -> list[StoredDocument]:
        """All documents, by name."""
        found: dict[str, tuple[str, int, int]] = {}
        for metadata in self.store.client.get(include=["metadatas"])["metadatas"]:
            name, chunks, tokens = found.get(metadata["ref_doc_id"], (metadata["file"], 0, 0))
            found[metadata["ref_doc_id"]] = (name, chunks + 1, tokens + metadata["tokens"])
        stats = self.engine.store.stats()
        per_token = stats.nbytes / stats.tokens if stats.tokens else 0.0
        listed = [StoredDocument(key, name, n, round(tokens * per_token)) for key, (name, n, tokens) in found.items()]
        return sorted(listed, key=lambda document: document.name.lower())

    def totals(self) -> dict[str, int]:
        """Number, tokens and bytes of the stored KV caches."""
        stats = self.engine.store.stats()
        return {"chunks": stats.chunks, "tokens": stats.tokens, "nbytes": stats.nbytes}

    def add(self, name: str, text: str, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Index a document, replacing the one of the same name; the same text again costs nothing.

        Args:
            name: Its file name.
            text: Its text.
            progress: Called with (chunks written, chunks to write).
        """
        key = hashlib.sha256(name.encode()).hexdigest()[:16]
        stamp = hashlib.sha256(text.encode()).hexdigest()
        with self._lock:
            old = self.store.client.get(where={"document_id": key}, include=["metadatas"])
            stamps = {metadata["stamp"] for metadata in old["metadatas"]}
            if stamps == {stamp} and old["metadatas"][0]["chunks"] == len(old["ids"]):
                return
            if not old["ids"] and len(self.documents()) >= MAX_DOCUMENTS:
                msg = f"There are {MAX_DOCUMENTS} documents already. Delete one first."
                raise InputError(msg)
            self.index.delete_ref_doc(key)
            nodes = self._split(key, name, text, stamp)
            for start in range(0, len(nodes), NODES_PER_WRITE):
                self.index.insert_nodes(nodes[start : start + NODES_PER_WRITE])
                progress(min(start + NODES_PER_WRITE, len(nodes)), len(nodes))

    def _split(self, key: str, name: str, text: str, stamp: str) -> list[Any]:
        metadata = {"file": name, "stamp": stamp, "chunks": 0, "tokens": 0, "part": 0}
        hidden = list(metadata)  # neither the model nor the embedding sees the bookkeeping
        document = Document(
            text=text,
            doc_id=key,
            metadata=metadata,
            excluded_llm_metadata_keys=hidden,
            excluded_embed_metadata_keys=hidden,
        )
        nodes = self._splitter.get_nodes_from_documents([document])
        for part, node in enumerate(nodes, start=1):
            tokens = len(self._token_ids(node.get_content().strip()))
            node.metadata |= {"chunks": len(nodes), "tokens": tokens, "part": part}
        return nodes

    def delete(self, document_id: str) -> StoredDocument:
        """Delete a document with its chunks and caches; raises `KeyError` if there is none."""
        with self._lock:
            document = {document.id: document for document in self.documents()}[document_id]
            self.index.delete_ref_doc(document_id)
            return document

    def add_folder(self, folder: Path, progress: Callable[[str], None]) -> list[str]:
        """Index every readable file of a folder; returns what was left out and why."""
        left_out = []
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        for path in files:
            try:
                name = check_name(shown_name(path.name))
                text = read_text(name, path.read_bytes())
                progress(f"Reading {name}")
                self.add(name, text, lambda done, total, name=name: progress(f"{name}: chunk {done} of {total}"))
            except (InputError, OSError) as error:
                left_out.append(f"{shown_name(path.name)}: {error}")
            except Exception as error:  # one document never keeps the others out
                logger.exception("a document was left out")
                left_out.append(f"{shown_name(path.name)}: {type(error).__name__}, see the terminal")
        return left_out

    def close(self) -> None:
        """Release the caches' files."""
        self.engine.store.close()
