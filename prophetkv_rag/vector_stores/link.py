"""What ties the caches to the records of any vector store: what to do before a call on it, and after.

Caches are computed before the vector store is written, and let go of after it is deleted from, so what a crash leaves
is at worst a cache that nothing uses. What a call that failed has really done is read back from the vector store.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from prophetkv_rag.errors import InputError, StoreError
from prophetkv_rag.vector_stores.caches import QUERY_SIZE, OwnedCaches, Progress, batches
from prophetkv_rag.vector_stores.document_order import Record
from prophetkv_rag.vector_stores.ledger import RecordLedger, Row, ledger_of, store_directory
from prophetkv_rag.vector_stores.neighbours import Neighbourhood, NeighbourPass
from prophetkv_rag.vector_stores.records import Records, UnreadableError, read_somehow
from prophetkv_rag.vector_stores.store_lock import StoreLock, store_lock

if TYPE_CHECKING:
    from prophetkv_rag.vector_stores.engine import CachingEngine

logger = logging.getLogger(__name__)


class Writing(NamedTuple):
    """Records that are being written, and the cache keys of their texts."""

    records: Sequence[Record]
    keys: dict[str, str | None]


class StoreLink(OwnedCaches):
    """The caches of one vector store. The caller holds `lock` from `begin` to `commit`, and around all else.

    Args:
        engine: Computes and keeps the caches.
        name: Tells this vector store from others whose caches are in the same place.
        records: Reads the vector store.
    """

    def __init__(self, engine: CachingEngine, name: str, records: Records) -> None:
        super().__init__(engine, f"store:{name}", f"vector store {name!r}")  # a colon: `cache gc` leaves it alone
        self.name = name
        self.records = records
        self.ledger: RecordLedger = ledger_of(engine.store)
        self._pending: dict[int, set[str]] = {}  # by the write that is under way
        self.num_writes = 0
        self.neighbours = NeighbourPass(engine, self.owner, self.label, lambda: self.lock.held())

    @property
    def lock(self) -> StoreLock:
        """Held while records and caches are changed together."""
        return store_lock(self.ledger, self.owner)

    def copy(self, records: Records) -> StoreLink:
        """Return the link of a copy of the vector store, which has the same records today and others tomorrow."""
        link = StoreLink(self.engine, f"{self.name} copy {uuid.uuid4().hex[:8]}", records)
        rows = self.ledger.rows(self.owner)
        self.engine.store.add_references(link.owner, [key for _, _, key in rows if key])
        link.ledger.put(link.owner, rows)
        return link

    def fetch(self, names: Sequence[str]) -> Sequence[Record]:
        """See `OwnedCaches.fetch`."""
        try:
            return [record for record in self.records.read(names) if record.text is not None]
        except UnreadableError:
            return []

    def carried(self, keys: Sequence[str]) -> set[str]:
        """See `OwnedCaches.carried`; what is being written counts."""
        return self.ledger.carried(self.owner, keys) | set().union(*list(self._pending.values())) & set(keys)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def begin(self, records: Sequence[Record]) -> Writing:
        """Compute the caches of what is about to be written; records whose ids are not known yet have the id ""."""
        keys: dict[str, str | None] = {}
        named = [record._replace(name=record.name or f" {number}") for number, record in enumerate(records)]
        try:
            self.compute([record.text for record in records], keys, None, self.before(named, is_one_call=True))
        except BaseException:
            self.release_after_error(keys.values())
            raise
        writing = Writing(records, keys)
        self._pending[id(writing)] = {key for key in keys.values() if key is not None}
        return writing

    def commit(self, writing: Writing, names: Sequence[str] | None) -> None:
        """Note what was written, under these ids; `None` where the vector store did not say."""
        self.num_writes += 1
        names = names or [record.name for record in writing.records]
        if len(names) == len(writing.records) and all(names):
            written = [record._replace(name=name) for name, record in zip(names, writing.records, strict=True)]
            self._note(written, writing)
        else:
            self.settle(writing)

    def settle(self, writing: Writing) -> None:
        """Note what is there of a write that failed, or that did not say; never raises an error of its own."""
        try:
            try:
                there = self._written(writing)
            except UnreadableError as error:
                there = []
                logger.warning(
                    "it is not known which of %d records were written to %s, so their caches are dropped: %s",
                    len(writing.records),
                    self.label,
                    error,
                )
            self._note(there, writing)
        except Exception:  # the first error is the one to show
            self._pending.pop(id(writing), None)
            logger.warning("caches of a failed write to %s may be left over", self.label, exc_info=True)

    def _written(self, writing: Writing) -> list[Record]:
        """Read what the vector store has of these records, and forget those that it has lost."""
        wanted = {record.name: record for record in writing.records}
        if "" in wanted:  # ids that the vector store gave, or was about to
            return [record for record in self.records.read_all() if record.text in writing.keys]
        found = {record.name: record for record in read_somehow(self.records, list(wanted))}
        self.forget([name for name in wanted if name not in found])
        return [wanted[name] for name, record in found.items() if record.text in (None, wanted[name].text)]

    def _note(self, records: Sequence[Record], writing: Writing) -> None:
        """Note that these records carry their texts' caches; other caches of the write are let go of."""
        rows = [(record.name, record.document, writing.keys.get(record.text or "") or "") for record in records]
        try:
            replaced = self.ledger.put(self.owner, rows)
            if replaced:
                self.ledger.put(self.owner, self._looked_up(replaced, rows))
        except StoreError as error:  # what is written is written; `cache_existing` finds it
            self.engine.store.failures.note(error)
            return
        finally:
            self._pending.pop(id(writing), None)
        self.release_if_possible({*writing.keys.values(), *(key for keys in replaced.values() for key in keys)})
        self._encode_later(records)

    def _looked_up(self, replaced: dict[str, set[str]], rows: Sequence[Row]) -> list[Row]:
        """What ids that were known before the write carry now: some vector stores keep the old text, some have both."""
        try:
            found = read_somehow(self.records, list(replaced))
        except UnreadableError:
            return []
        possible = {name: set(keys) for name, keys in replaced.items()}
        for name, _, key in rows:
            possible.get(name, set()).add(key)
        keyed = [(one, self.engine.key_of(one.text)) for one in found if one.text is not None and one.text.strip()]
        return [(one.name, one.document, key) for one, key in keyed if key in possible.get(one.name, ())]

    # ---- deleting ---------------------------------------------------------------------------------------------------

    def forget(self, names: Sequence[str]) -> None:
        """Let go of the caches of records that are deleted.

        Raises:
            StoreError: If they cannot be deleted. They are still known then, so that it can be tried again.
        """
        rows = self.ledger.remove(self.owner, names)
        try:
            self.release(key for _, _, key in rows)
        except BaseException:
            self.ledger.put(self.owner, rows)
            raise

    def forget_missing(self, names: Sequence[str] | None = None) -> None:
        """Let go of the caches of those of these records (by default: of all) that the vector store does not have.

        Where the vector store cannot be read, that is logged and the caches stay.

        Raises:
            StoreError: As `forget`.
        """
        names = self.ledger.names(self.owner) if names is None else names
        try:
            for part in batches(names, QUERY_SIZE):
                there = {record.name for record in read_somehow(self.records, part)}
                self.forget([name for name in part if name not in there])
        except UnreadableError as error:
            logger.warning("caches of what was deleted from %s may be left over: %s", self.label, error)

    # ---- all of it --------------------------------------------------------------------------------------------------

    def cache_existing(self) -> None:
        """Cache every text that the vector store has, and let go of the caches of what it does not have (any more).

        Raises:
            InputError: If the vector store does not say what it has. Nothing is changed then.
        """
        self.num_writes += 1
        try:
            records = iter(self.records.read_all())
            first = list(islice(records, QUERY_SIZE))
        except UnreadableError as error:
            raise InputError(str(error)) from None
        there: set[str] = set()
        num_unknown = 0
        for part in _parts(first, records):
            there.update(record.name for record in part)
            with_text = [record for record in part if record.text is not None]
            keys: dict[str, str | None] = {}
            try:
                self.compute([one.text for one in with_text], keys, None, self.before(with_text, is_one_call=False))
                rows = [(record.name, record.document, keys.get(record.text or "") or "") for record in with_text]
                replaced = self.ledger.put(self.owner, rows)
            except BaseException:
                self.release_after_error(keys.values())
                raise
            self.release(key for keys_of_one in replaced.values() for key in keys_of_one)
            without = [record.name for record in part if record.text is None]
            num_unknown += len(without) - len(self.ledger.known(self.owner, without))
        self.forget([name for name in self.ledger.names(self.owner) if name not in there])
        self.release(self.engine.store.references(self.owner))
        if num_unknown:
            logger.warning(
                "%d records of %s get no cache: it does not keep their texts; give with_kv_caches(..., read=...) a "
                "function that returns them",
                num_unknown,
                self.label,
            )
        self._encode_later([Record(name, None, None) for name in self.ledger.names(self.owner)])

    # ---- behind neighbours ------------------------------------------------------------------------------------------

    def encode_behind_neighbours(self, progress: Progress = None, *, refresh: bool = False) -> None:
        """Encode every text behind its nearest neighbours, see `NeighbourPass.run`; `lock` is not held.

        Raises:
            InputError: If the vector store does not say what it has, or what is near.
        """
        if not self.neighbours.is_wanted:
            return
        self.neighbours.wait()
        try:
            self.neighbours.run(self.ledger.names(self.owner), self._near, progress, refresh=refresh)
        except UnreadableError as error:
            raise InputError(str(error)) from None

    def _encode_later(self, records: Sequence[Record]) -> None:
        """Encode what was written in a thread, where that can be; records without a text are read back."""
        if self.neighbours.is_wanted and records and not self.records.is_of_one_thread:
            written = {record.name: record for record in records if record.text is not None and record.text.strip()}
            self.neighbours.later([record.name for record in records], lambda names: self._near(names, written))

    def _near(self, names: Sequence[str], written: Mapping[str, Record] = MappingProxyType({})) -> Neighbourhood:
        """What finds neighbours; of what was written, that which is there still need not be read back."""
        here = [written[name] for name in names if name in written]
        carried = self.ledger.by_name(self.owner, [record.name for record in here])
        return self.records.neighbourhood(
            [one for one in here if self.engine.key_of(one.text or "") in carried.get(one.name, ())]
        )


def _parts(first: list[Record], rest: Iterator[Record]) -> Iterator[list[Record]]:
    part = first
    while part:
        yield part
        part = list(islice(rest, QUERY_SIZE))


def store_name(given: str | None, found: str | None, engine: CachingEngine) -> str:
    """Return what to call a vector store whose caches this engine keeps.

    Args:
        given: What the caller says.
        found: What the vector store calls itself, such as a collection's name.
        engine: Where its store lasts, the name must be the same on every start.

    Raises:
        InputError: If there is no name and one is needed.
    """
    if given is not None:
        if not isinstance(given, str) or not given.strip():
            msg = f"name is {given!r}; give a short text that tells this vector store from others"
            raise InputError(msg)
        return given
    if store_directory(engine.store) is None:
        return f"{found or 'unnamed'} {uuid.uuid4().hex[:8]}"  # as short-lived as the caches
    if found is None:
        msg = (
            "this vector store has no name of its own, and its caches are kept on disk; give "
            'with_kv_caches(store, engine, name="..."), the same on every start, so that its caches are found again'
        )
        raise InputError(msg)
    return found
