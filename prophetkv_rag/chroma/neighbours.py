"""The second pass: chunks are encoded again behind their nearest neighbours of the collection, after they are written.

It runs in a thread, so that a framework's `add` returns when the records are there; until it has come to a chunk, that
one's plain cache is used. Interrupted, it is taken up by `cache warm`: what has been encoded so is not again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from prophetkv_rag.chroma.locks import collection_lock
from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.vector_stores import batches

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.vector_stores import Progress

logger = logging.getLogger(__name__)

BATCH = 32
"""Records that are encoded while others wait to write to the collection."""
_SPARES = 4  # of what is found, the record itself and others with its very text are left out


class NeighbourPass:
    """Encodes the texts of one collection behind their neighbours.

    Args:
        collection: A chromadb collection.
        engine: Computes and keeps the caches; its configuration says behind how many.
        owner: Who refers to them, in the store's words.
    """

    def __init__(self, collection: Callable[[], Any], engine: ProphetKVEngine, owner: str) -> None:
        self._collection = collection
        self._engine = engine
        self._owner = owner
        self._has_told = False
        self._lock = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        self._futures: set[Future[None]] = set()

    def later(self, names: Sequence[str]) -> None:
        """Encode these records some time soon."""
        with self._lock:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prophetkv-neighbours")
            future = self._worker.submit(self._guarded, names)
            self._futures.add(future)
        future.add_done_callback(self._futures.discard)

    def wait(self) -> None:
        """Wait until all that was given to `later` is done."""
        while futures := list(self._futures):
            for future in futures:
                future.result()

    def run(self, names: Sequence[str], progress: Progress = None, *, refresh: bool = False) -> None:
        """Encode these records now.

        Args:
            names: Their ids.
            progress: Called with (records looked at so far, all of them).
            refresh: Whether to encode anew what stands behind others than most of its neighbours of today.
        """
        for start, part in enumerate(batches(names, BATCH)):
            with collection_lock(self._owner):
                self._encode(part, refresh=refresh)
            if progress is not None:
                progress(min(len(names), (start + 1) * BATCH), len(names))

    def _guarded(self, names: Sequence[str]) -> None:
        try:
            self.run(names)
        except Exception as error:  # nobody waits for it, and the plain caches are there
            logger.warning("chunks stay encoded without their neighbours: %s", error)
            logger.debug("as this failed", exc_info=True)

    def _encode(self, names: Sequence[str], *, refresh: bool) -> None:
        collection, count = self._collection(), self._engine.library.encoding.num_neighbours
        found = collection.get(ids=list(names), include=["embeddings", "documents"])
        rows = [
            (text, embedding)
            for text, embedding in zip(found["documents"] or (), _or_none(found["embeddings"]), strict=False)
            if text and text.strip() and embedding is not None
        ]
        if len(rows) < len(found["ids"]):
            self._tell(collection, len(found["ids"]) - len(rows))
        alone = set(self._engine.library.without_order([text for text, _ in rows]))
        rows = [row for row in rows if row[0] in alone]
        if not rows:
            return
        texts = [text for text, _ in rows]
        wanted = min(count + _SPARES, collection.count())
        nearest = collection.query(
            query_embeddings=[embedding for _, embedding in rows], n_results=wanted, include=["documents"]
        )["documents"]
        behind = [_nearest_last(text, others, count) for text, others in zip(texts, nearest, strict=True)]
        try:
            self._engine.library.add(texts, owner=self._owner, behind=behind, refresh=refresh, as_neighbours=True)
        except InputError:  # one of them cannot be a chunk, which was said when it was written
            for text, before in zip(texts, behind, strict=True):
                self._encode_one(text, before, refresh=refresh)
        except StoreError as error:
            self._engine.store.failures.note(error)

    def _encode_one(self, text: str, before: Sequence[str], *, refresh: bool) -> None:
        try:
            self._engine.library.add([text], owner=self._owner, behind=[before], refresh=refresh, as_neighbours=True)
        except InputError as error:
            logger.debug("a text is no chunk: %s", error)

    def _tell(self, collection: Any, count: int) -> None:
        if not self._has_told:
            logger.warning(
                "%d records of collection %r have no text or no embedding: they are encoded without neighbours",
                count,
                collection.name,
            )
        self._has_told = True


def _or_none(embeddings: Any) -> Iterable[Any]:
    return () if embeddings is None else embeddings


def _nearest_last(text: str, others: Sequence[str | None], count: int) -> list[str]:
    """The texts of the nearest other records, the nearest right before the chunk."""
    kept = [other for other in dict.fromkeys(others) if other and other.strip() and other.strip() != text.strip()]
    return kept[:count][::-1]
