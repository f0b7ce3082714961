"""Indexing a directory into a database: split, embed, compute the caches; only what changed."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prophetkv_rag.cli.console import progress_bar
from prophetkv_rag.cli.database import token_counter
from prophetkv_rag.cli.documents import Documents, TextFile
from prophetkv_rag.cli.planning import CachePlan
from prophetkv_rag.text import shown_name

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from prophetkv_rag.cli.database import Database

NODES_PER_INSERT = 8
"""About one forward pass of the engine; small, so that the bar moves and little is lost when interrupted."""


@dataclass(slots=True)
class IndexSummary:
    """What indexing did, by file name; `new_chunks` were split and embedded now, `total_chunks` are stored.

    `planned` is what was said beforehand of the caches among them that had to be computed.
    """

    indexed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    planned: CachePlan = field(default_factory=CachePlan)
    new_chunks: int = 0
    total_chunks: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _StoredFile:
    """What the database holds of one file: each chunk's id and stamp, and how many chunks there should be."""

    stamps: dict[str, str] = field(default_factory=dict)
    expected: int = 0

    def is_current(self, stamp: str) -> bool:
        """Whether all of the file's chunks are there, and no others; after an interrupted run they may not be."""
        return len(self.stamps) == self.expected and set(self.stamps.values()) == {stamp}


@dataclass(frozen=True, slots=True)
class FileToSplit:
    """A file that is new or has changed, with all that its chunks are made from; plain data, which may travel."""

    file: TextFile
    root: str
    stamp: str
    chunk_size: int


class Workers(Protocol):
    """Others who do what takes long, in place of this process (`cli/on_ray.py`)."""

    def split(self, files: Sequence[FileToSplit]) -> list[list[BaseNode]]:
        """Return each file's chunks."""

    def encode(self, database: Database, nodes: Sequence[Sequence[BaseNode]]) -> Iterator[list[BaseNode]]:
        """Compute caches and embeddings; yields, as they are done, chunks that only have to be written."""

    def complete(self, database: Database) -> None:
        """Compute again what the deletion of other chunks has taken along."""


def index_documents(
    database: Database,
    directory: Path,
    documents: Documents,
    *,
    only_corpus: str | None = None,
    workers: Workers | None = None,
) -> IndexSummary:
    """Bring the database up to date with `documents`, read from `directory`.

    A file is known by the directory and its name relative to it, so several directories may have a file of one name. A
    changed file's chunks are replaced; files of the same directory that are gone are removed. Another chunk size counts
    as a change of every file. New chunks are written before old ones are deleted, so the caches of chunks that a change
    left alone are kept.

    `only_corpus` is a name for what the database is about as a whole, wherever its directory lies today: the files are
    known by it, and whatever else is stored goes. `workers` compute in place of this process, which only writes.
    """
    started = time.perf_counter()
    summary = IndexSummary(skipped=dict(documents.skipped))
    root = only_corpus or shown_name(directory.resolve())
    stored = _stored_files(database)
    changed: list[FileToSplit] = []
    old_ids: set[str] = set()
    for file in documents.files:
        stamp, held = _stamp(database, file), stored.get((root, file.name), _StoredFile())
        if held.is_current(stamp):
            summary.unchanged.append(file.name)
            continue
        old_ids.update(held.stamps)
        changed.append(FileToSplit(file, root, stamp, database.settings.chunk_size))
        summary.indexed.append(file.name)
    names = {file.name for file in documents.files}
    for (directory_of, file_name), held in stored.items():
        if (directory_of == root and file_name not in names) or (only_corpus and directory_of != root):
            old_ids.update(held.stamps)
            summary.removed.append(file_name)
    split = (
        [split_file(one, database.engine.tokenizer) for one in changed] if workers is None else workers.split(changed)
    )
    nodes = [node for of_one in split for node in of_one]
    summary.planned = database.plan((node.text for node in nodes), is_timed=workers is None)
    _insert(database, len(nodes), _in_parts(nodes) if workers is None else workers.encode(database, split))
    database.index.vector_store.delete_nodes(sorted(old_ids - {node.node_id for node in nodes}))
    if nodes or old_ids:  # deleted chunks have taken along what was encoded behind them
        if workers is not None:
            workers.complete(database)
        database.complete_encoding()
    summary.new_chunks = len(nodes)
    summary.total_chunks = database.collection.count()
    summary.seconds = time.perf_counter() - started
    return summary


def _in_parts(nodes: Sequence[BaseNode]) -> Iterator[list[BaseNode]]:
    for start in range(0, len(nodes), NODES_PER_INSERT):
        yield list(nodes[start : start + NODES_PER_INSERT])


def _insert(database: Database, count: int, parts: Iterator[list[BaseNode]]) -> None:
    if not count:
        return
    with progress_bar("computing embeddings and KV caches", count) as advance:
        for part in parts:
            database.index.insert_nodes(part)
            advance(len(part))


def _stamp(database: Database, file: TextFile) -> str:
    """Everything that the file's stored chunks depend on."""
    return hashlib.sha256(f"{database.settings.chunk_size}:{file.text}".encode()).hexdigest()


def _stored_files(database: Database) -> dict[tuple[str, str], _StoredFile]:
    """Return what is stored by directory and name."""
    files: dict[tuple[str, str], _StoredFile] = defaultdict(_StoredFile)
    found = database.collection.get(include=["metadatas"])
    for node_id, metadata in zip(found["ids"], found["metadatas"], strict=True):
        metadata = metadata or {}
        held = files[str(metadata.get("root", "")), str(metadata.get("file", ""))]
        held.stamps[node_id] = str(metadata.get("stamp", ""))
        held.expected = int(metadata.get("num_chunks", 0))
    return dict(files)


def split_file(one: FileToSplit, tokenizer: Any) -> list[BaseNode]:
    """Return a file's chunks, as they are written."""
    from llama_index.core.schema import Document

    def node_id(number: int, document: Any) -> str:
        return f"{document.node_id}#{number}@{one.stamp[:8]}"

    metadata: dict[str, Any] = {"file": one.file.name, "root": one.root, "stamp": one.stamp, "num_chunks": 0}
    document = Document(
        text=one.file.text,
        doc_id=f"{hashlib.sha256(one.root.encode()).hexdigest()[:8]}/{one.file.name}",
        metadata=metadata,
        # Neither the model nor the embedding sees the bookkeeping: a chunk in the prompt is its text alone.
        excluded_llm_metadata_keys=list(metadata),
        excluded_embed_metadata_keys=list(metadata),
    )
    splitter = _splitter(one.chunk_size, tokenizer, id_func=node_id)
    with redirect_stdout(sys.stderr):  # LlamaIndex prints some of its warnings
        nodes = splitter.get_nodes_from_documents([document])
    for node in nodes:
        node.metadata["num_chunks"] = len(nodes)
    return nodes


def split_texts(texts: Sequence[str], chunk_size: int, tokenizer: Any) -> list[list[str]]:
    """Return the chunks that indexing would make of each text."""
    splitter = _splitter(chunk_size, tokenizer)
    with redirect_stdout(sys.stderr):
        return [splitter.split_text(text) for text in texts]


def _splitter(chunk_size: int, tokenizer: Any, **options: Any) -> Any:
    from llama_index.core.node_parser import SentenceSplitter

    counter = token_counter(tokenizer)
    return SentenceSplitter(chunk_size=chunk_size, chunk_overlap=0, tokenizer=counter, **options)
