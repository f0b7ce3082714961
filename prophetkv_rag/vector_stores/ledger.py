"""Which record of a vector store carries which cache, where the vector store itself is not to be asked.

Most vector stores cannot say which of their records hold a text, and what is added to a record's metadata shows in
what is read. So we keep it ourselves: one small SQLite file beside the caches (`records.sqlite` in the store's
directory), or in RAM where the caches are in RAM.
"""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from prophetkv_rag.errors import StoreError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.store import ChunkStore, touch_private
from prophetkv_rag.vector_stores.caches import QUERY_SIZE, batches

BUSY_TIMEOUT_S = 60.0
_TABLES = (
    "CREATE TABLE IF NOT EXISTS records (owner TEXT NOT NULL, name TEXT NOT NULL, document TEXT NOT NULL, "
    "key TEXT NOT NULL, PRIMARY KEY (owner, name, key)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS records_by_key ON records (owner, key)",
    "CREATE INDEX IF NOT EXISTS records_by_document ON records (owner, document)",
)

Row = tuple[str, str, str]
"""A record's id, the document it is deleted with ("" for none), and its cache key ("": its text has no cache).

Some vector stores keep several records under one id, so an id may have several rows.
"""


class RecordLedger:
    """Records of vector stores, by owner. Safe to use from several threads and processes.

    On disk each call opens the file anew: SQLite's connections must not cross a fork.

    Args:
        path: The file, made if it is not there; `None` for RAM.

    Raises:
        StoreError: If the file cannot be used; also of every method.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._memory = sqlite3.connect(":memory:", check_same_thread=False) if path is None else None
        around_fork(self, "_lock")
        try:
            if path is not None:
                touch_private(path)
            with self._transaction() as run:
                for statement in _TABLES:
                    run.execute(statement)
        except OSError as error:
            msg = f"cannot keep which records have which caches in {path}: {error}"
            raise StoreError(msg) from error

    def put(self, owner: str, rows: Sequence[Row]) -> dict[str, set[str]]:
        """Note what records carry instead of what they carried; returns that, by id, where it is something else."""
        with self._transaction() as run:
            old = self._by_name(run, owner, [name for name, _, _ in rows])
            run.executemany("DELETE FROM records WHERE owner = ? AND name = ?", [(owner, name) for name, _, _ in rows])
            self._insert(run, owner, rows)
        for name, _, key in rows:
            old.get(name, set()).discard(key)
        return {name: keys for name, keys in old.items() if keys}

    def remove(self, owner: str, names: Sequence[str]) -> list[Row]:
        """Forget records; returns what was known of them."""
        with self._transaction() as run:
            rows: list[Row] = []
            for part in batches(list(names), QUERY_SIZE):
                marks = ", ".join("?" * len(part))
                query = f"SELECT name, document, key FROM records WHERE owner = ? AND name IN ({marks})"
                rows += run.execute(query, (owner, *part))
            run.executemany("DELETE FROM records WHERE owner = ? AND name = ?", [(owner, name) for name in names])
        return rows

    def rows(self, owner: str) -> list[Row]:
        """Return all that is known of an owner."""
        with self._transaction() as run:
            return list(run.execute("SELECT name, document, key FROM records WHERE owner = ?", (owner,)))

    def names(self, owner: str) -> list[str]:
        """Return the ids of an owner's records."""
        return list(dict.fromkeys(name for name, _, _ in self.rows(owner)))

    def known(self, owner: str, names: Sequence[str]) -> set[str]:
        """Return those of these records that an owner has."""
        with self._transaction() as run:
            return {name for name, _ in self._named(run, owner, names)}

    def by_name(self, owner: str, names: Sequence[str]) -> dict[str, set[str]]:
        """Return what these records of an owner carry, by id."""
        with self._transaction() as run:
            return self._by_name(run, owner, names)

    def keys(self, owner: str, names: Sequence[str]) -> list[str]:
        """Return the keys of these records of an owner, in their order, as far as they have caches."""
        with self._transaction() as run:
            found = dict(self._named(run, owner, names))
        return [key for name in names if (key := found.get(name))]

    def of_document(self, owner: str, document: str) -> list[str]:
        """Return the ids of a document's records; that of the record with this id too."""
        with self._transaction() as run:
            found = run.execute(
                "SELECT name FROM records WHERE owner = ? AND (document = ? OR name = ?)", (owner, document, document)
            )
            return [name for (name,) in found]

    def carried(self, owner: str, keys: Sequence[str]) -> set[str]:
        """Return those of these keys that a record of the owner carries."""
        carried: set[str] = set()
        with self._transaction() as run:
            for part in batches(list(keys), QUERY_SIZE):
                marks = ", ".join("?" * len(part))
                query = f"SELECT DISTINCT key FROM records WHERE owner = ? AND key IN ({marks})"
                carried.update(key for (key,) in run.execute(query, (owner, *part)))
        return carried

    @staticmethod
    def _insert(run: sqlite3.Connection, owner: str, rows: Sequence[Row]) -> None:
        run.executemany(
            "INSERT OR REPLACE INTO records (owner, name, document, key) VALUES (?, ?, ?, ?)",
            [(owner, *row) for row in rows],
        )

    def _by_name(self, run: sqlite3.Connection, owner: str, names: Sequence[str]) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name, key in self._named(run, owner, names):
            found.setdefault(name, set()).add(key)
        return found

    def _named(self, run: sqlite3.Connection, owner: str, names: Sequence[str]) -> Iterable[tuple[str, str]]:
        for part in batches(list(names), QUERY_SIZE):
            marks = ", ".join("?" * len(part))
            yield from run.execute(
                f"SELECT name, key FROM records WHERE owner = ? AND name IN ({marks})", (owner, *part)
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._memory is not None:
                with self._lock, self._memory:
                    yield self._memory
                return
            with closing(sqlite3.connect(self.path or "", timeout=BUSY_TIMEOUT_S)) as connection:
                connection.execute("PRAGMA secure_delete = ON")
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    yield connection
        except sqlite3.Error as error:
            msg = f"cannot keep which records have which caches in {self.path}: {error}"
            raise StoreError(msg) from error


_ledgers: weakref.WeakKeyDictionary[ChunkStore, RecordLedger] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def _forget_guard(_: object) -> None:
    global _guard
    _guard = threading.Lock()


around_fork(_ledgers, in_child=_forget_guard)


def ledger_of(store: ChunkStore) -> RecordLedger:
    """Return the ledger that belongs to a store of caches: beside them, so that both last as long.

    Raises:
        StoreError: If its file cannot be used.
    """
    with _guard:
        ledger = _ledgers.get(store)
        if ledger is None:
            directory = store_directory(store)
            ledger = _ledgers[store] = RecordLedger(None if directory is None else directory / "records.sqlite")
        return ledger


def store_directory(store: ChunkStore) -> Path | None:
    """Return where a store keeps its caches, if what is written about them is to last as long; `None` for RAM."""
    directory = getattr(store, "directory", None)
    return directory if isinstance(directory, Path) and store.policy != "read_only" else None
