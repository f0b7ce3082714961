"""The second pass: chunks are encoded again behind their nearest neighbours of the collection, after they are written.

It runs in a thread, so that a framework's `add` returns when the records are there; until it has come to a chunk, that
one's plain cache is used. Interrupted, it is taken up by `cache warm`: what has been encoded so is not again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.vector_stores.caches import Progress, batches

if TYPE_CHECKING:
    from prophetkv_rag.vector_stores.engine import CachingEngine

logger = logging.getLogger(__name__)

BATCH = 32
"""Records that are encoded while others wait to write to the collection."""
_SPARES = 4  # of what is found, the record itself and others with its very text are left out


class Placed(NamedTuple):
    """A record's text, and where its embedding stands; `None` where the search makes it of the text."""

    text: str
    embedding: Any


class Neighbourhood(Protocol):
    """How one vector store finds what is near."""

    def place(self, names: Sequence[str]) -> tuple[list[Placed], int]:
        """Return these records, and how many are left out, as they have no text (an empty one is none) or embedding."""

    def nearest(self, placed: Sequence[Placed], count: int) -> Sequence[Sequence[str | None]]:
        """Return for each the texts of up to `count` records, the nearest first; its own may be among them."""


MakeNeighbourhood = Callable[[Sequence[str]], Neighbourhood]
"""Makes what finds the neighbours of records with these ids; asked anew for each part, as the lock was free between."""


class NeighbourPass:
    """Encodes the texts of one collection behind their neighbours.

    Args:
        engine: Computes and keeps the caches; its configuration says behind how many.
        owner: Who refers to them, in the store's words.
        label: What to call the records' place in messages.
        lock: Makes what is held while records and caches are changed together.
    """

    def __init__(
        self, engine: CachingEngine, owner: str, label: str, lock: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._engine = engine
        self._owner = owner
        self._label = label
        self._lock = lock
        self._has_told = False
        self._begin_anew()
        around_fork(self, in_child=NeighbourPass._begin_anew)

    def _begin_anew(self) -> None:
        # What was left to a thread of the parent's is done there.
        self._guard = threading.Lock()
        self._worker: ThreadPoolExecutor | None = None
        self._futures: set[Future[None]] = set()

    @property
    def is_wanted(self) -> bool:
        """Whether the engine's encoding is that."""
        return self._engine.library.encoding.num_neighbours > 0

    def later(self, names: Sequence[str], where: MakeNeighbourhood) -> None:
        """Encode these records some time soon."""
        with self._guard:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prophetkv-neighbours")
            future = self._worker.submit(self._guarded, names, where)
            self._futures.add(future)
        future.add_done_callback(self._futures.discard)

    def wait(self) -> None:
        """Wait until all that was given to `later` is done."""
        while futures := list(self._futures):
            for future in futures:
                future.result()

    def run(
        self,
        names: Sequence[str],
        where: MakeNeighbourhood,
        progress: Progress = None,
        *,
        refresh: bool = False,
    ) -> None:
        """Encode these records now.

        Args:
            names: Their ids.
            where: Makes what finds their neighbours.
            progress: Called with (records looked at so far, all of them).
            refresh: Whether to encode anew what stands behind others than most of its neighbours of today.
        """
        for start, part in enumerate(batches(names, BATCH)):
            with self._lock():
                self._encode(part, where(part), refresh=refresh)
            if progress is not None:
                progress(min(len(names), (start + 1) * BATCH), len(names))

    def _guarded(self, names: Sequence[str], where: MakeNeighbourhood) -> None:
        try:
            self.run(names, where)
        except Exception as error:  # nobody waits for it, and the plain caches are there
            logger.warning("chunks of %s stay encoded without their neighbours: %s", self._label, error)
            logger.debug("as this failed", exc_info=True)

    def _encode(self, names: Sequence[str], where: Neighbourhood, *, refresh: bool) -> None:
        count = self._engine.library.encoding.num_neighbours
        placed, num_left_out = where.place(names)
        if num_left_out:
            self._tell(num_left_out)
        alone = set(self._engine.library.without_order([one.text for one in placed]))
        placed = [one for one in placed if one.text in alone]
        if not placed:
            return
        texts = [one.text for one in placed]
        nearest = where.nearest(placed, count + _SPARES)
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

    def _tell(self, count: int) -> None:
        if not self._has_told:
            logger.warning(
                "%d records of %s have no text or no embedding: they are encoded without neighbours",
                count,
                self._label,
            )
        self._has_told = True


def _nearest_last(text: str, others: Sequence[str | None], count: int) -> list[str]:
    """The texts of the nearest other records, the nearest right before the chunk."""
    kept = [other for other in dict.fromkeys(others) if other and other.strip() and other.strip() != text.strip()]
    return kept[:count][::-1]
