"""One owner's caches: computed for the texts of its records, let go of with the last record that has them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.store import is_key
from prophetkv_rag.vector_stores.document_order import Record, previous_texts, tells_order

if TYPE_CHECKING:
    from prophetkv_rag.vector_stores.engine import CachingEngine

logger = logging.getLogger(__name__)

QUERY_SIZE = 1000
"""Ids or keys in one read; SQLite, behind Chroma and behind us, takes at most 32,766 variables."""

Progress = Callable[[int, int], None] | None
"""Called with (chunks computed so far, chunks to compute)."""

S = TypeVar("S", bound=Sequence[Any])


class OwnedCaches(ABC):
    """What the engine's store keeps for the records of one collection or vector store.

    Args:
        engine: Computes and keeps the caches.
        owner: Who refers to them, in the store's words.
        label: What to call the records' place in messages.
    """

    def __init__(self, engine: CachingEngine, owner: str, label: str) -> None:
        self.engine = engine
        self.owner = owner
        self.label = label
        self._has_told = False

    @abstractmethod
    def fetch(self, names: Sequence[str]) -> Sequence[Record]:
        """Return the stored records with these ids, as far as there are such."""

    @abstractmethod
    def carried(self, keys: Sequence[str]) -> set[str]:
        """Return those of these cache keys that a record still carries."""

    def before(self, records: Sequence[Record], *, is_one_call: bool) -> dict[str, list[str]]:
        """Return the texts before each text in its document, where chunks are encoded behind those."""
        encoding = self.engine.library.encoding
        if encoding.kind != "previous":
            return {}
        is_one_call = is_one_call and encoding.is_order_guessed
        found = previous_texts(records, encoding.count, self.fetch, is_one_call=is_one_call)
        is_told = is_one_call or tells_order(records) or self._has_told
        if len(records) > 1 and encoding.is_order_guessed and not is_told:
            self._has_told = True
            logger.warning(
                "the records of %s do not say in which order they stand in their documents: chunks are encoded alone "
                "(encoding %s)",
                self.label,
                encoding,
            )
        return found

    def compute(
        self,
        texts: Iterable[str | None],
        keys: dict[str, str | None],
        progress: Progress,
        before: Mapping[str, Sequence[str]],
    ) -> None:
        """Fill `keys` (text -> cache key, or `None` if it cannot be a chunk), computing what is missing.

        `before` says which texts stand before a text in its document.
        """
        wanted = list(dict.fromkeys(text for text in texts if text is not None))
        refused: list[InputError] = []

        def add(part: list[str]) -> None:
            try:
                behind = [before.get(text, ()) for text in part]
                added: Sequence[str | None] = self.engine.add_chunks(
                    part, owner=self.owner, behind=behind, progress=progress
                )
            except InputError as error:  # about one of them; the engine has stored none
                if len(part) > 1:
                    add(part[: len(part) // 2])
                    add(part[len(part) // 2 :])
                    return
                refused.append(error)
                added = [None]
            keys.update(zip(part, added, strict=True))

        keys.update((text, None) for text in wanted if not text.strip())
        usable = [text for text in wanted if text.strip()]
        if usable:
            add(usable)
        if len(usable) < len(wanted) or refused:
            count = len(wanted) - len(usable) + len(refused)
            reason = refused[0] if refused else "empty"
            logger.warning("%d texts in %s get no KV cache: %s", count, self.label, reason)

    def release(self, keys: Iterable[str | None]) -> None:
        """Drop the references to those of these keys that no record carries."""
        unused = {key for key in keys if key is not None and is_key(key)}
        for batch in batches(sorted(unused), QUERY_SIZE):
            unused -= self.carried(batch)
        if unused:
            self.engine.remove_chunks(sorted(unused), owner=self.owner)

    def release_if_possible(self, keys: Iterable[str | None]) -> None:
        """As `release` after a write that went through: a store that fails leaves caches for `cache gc`."""
        try:
            self.release(keys)
        except (StoreError, OSError) as error:
            self.engine.store.failures.note(error)

    def release_after_error(self, keys: Iterable[str | None]) -> None:
        """As `release` after a write that failed; never raises an error of its own."""
        try:
            self.release(keys)
        except Exception:  # the first error is the one to show
            logger.warning("caches of a failed write to %s may be left over", self.label, exc_info=True)


def batches(items: S, size: int) -> Iterator[S]:
    """Cut a sequence into parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]  # type: ignore[misc]  # a slice is of the sequence's own type
