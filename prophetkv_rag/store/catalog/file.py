"""The catalog's file: how it is opened, its transactions, and what becomes of it when it is damaged or a fork comes."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prophetkv_rag.errors import StoreError
from prophetkv_rag.forks import Lock, Order, around_fork
from prophetkv_rag.store import has_locks
from prophetkv_rag.store.catalog.schema import bring_up_to_date, check_sqlite

BUSY_TIMEOUT_S = 60.0


class CorruptCatalogError(StoreError):
    """The catalog's file is damaged; it can be made again from the blobs."""


class CatalogFile:
    """One connection that writes and one that reads. Safe to use from several threads and processes.

    SQLite's connections must not cross a fork: what a child has inherited makes it take locks for its own that only
    its parent holds. So they are closed before a fork, and opened again by whoever needs them next on either side.

    Args:
        path: The SQLite file, absolute; made if it is not there, brought up to date if an older version made it.
        read_only: Change nothing, not even the tables' version; works in a directory that cannot be written to.

    Attributes:
        is_new: Whether the file had no tables yet.

    Raises:
        CorruptCatalogError: If the file is no SQLite database, or a damaged one.
        StoreError: If the file cannot be used, or was made by a newer version.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        check_sqlite(path)
        self._path = path
        self._read_only = read_only
        self._lock = threading.RLock()  # of writes; a thread inside a write reads by it too
        self._read_lock = threading.Lock()  # of all other reads: they wait for nobody's write
        self._writing_thread: int | None = None
        self._is_alone = not read_only and not has_locks(path.parent)
        self._is_let_go = self._is_lost = False
        self.is_new = False
        self._connect()
        around_fork(
            self,
            "_lock",
            "_read_lock",
            order=Order.CATALOG,
            before=CatalogFile._let_go,
            in_child=CatalogFile._begin_anew,
        )

    def renew(self) -> None:
        """Set the damaged file aside and go on with an empty one."""
        with self._lock, self._read_lock:
            self._close()
            set_aside(self._path)
            self._connect()

    def scrub(self) -> None:
        """Empty the log of writes, which also holds deleted rows, unless others use it for more than a second."""
        with suppress(sqlite3.Error, StoreError), self._connected(self._lock):
            self._writer.execute("PRAGMA busy_timeout = 1000")
            try:
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                self._writer.execute(f"PRAGMA busy_timeout = {int(1000 * BUSY_TIMEOUT_S)}")

    def close(self) -> None:
        """Close the file."""
        with self._lock, self._read_lock:
            self._close()

    @contextmanager
    def transaction(self, *, is_write: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, rolled back on an exception; inside a thread's write transaction another one joins it."""
        is_inside = self._writing_thread == threading.get_ident()
        try:
            if is_inside:
                yield self._writer
            elif not (is_write or self._is_alone):
                with self._connected(self._read_lock):
                    self._reader.execute("BEGIN")
                    with self._reader:
                        yield self._reader
            else:
                with self._connected(self._lock):
                    self._writer.execute("BEGIN IMMEDIATE")
                    self._writing_thread = threading.get_ident()
                    try:
                        with self._writer:  # commits, or rolls back on an exception
                            yield self._writer
                    finally:
                        self._writing_thread = None
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                self.scrub()  # what the log takes is room for the next try
            raise self._error(error) from error

    @contextmanager
    def _connected(self, lock: Lock) -> Iterator[None]:
        """Hold a lock, with the connections open."""
        while True:
            with lock:
                if not (self._is_let_go or self._is_lost):
                    yield
                    return
            self._connect_again()

    def _connect(self) -> None:
        uri = self._path.as_uri()
        try:
            if self._read_only:
                self._writer = self._reader = connect_read_only(uri)
                return
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # -wal and -shm take over the mode
            self._writer = connect(uri + "?vfs=unix-none" if self._is_alone else uri)
        except (OSError, sqlite3.Error) as error:
            raise self._error(error) from error
        try:
            self._open()
            self._reader = self._writer if self._is_alone else connect(uri)
        except BaseException:
            self._writer.close()
            raise

    def _open(self) -> None:
        try:
            if self._is_alone:
                self._writer.execute("PRAGMA locking_mode = EXCLUSIVE")  # or SQLite wants memory that is shared
            if self._writer.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.execute("PRAGMA secure_delete = ON")  # deleted rows hold hashes of what texts said
        except sqlite3.Error as error:
            raise self._error(error) from error
        with self.transaction() as run:
            self.is_new = bring_up_to_date(run, self._path) == 0

    def _close(self) -> None:
        self._is_let_go = False
        self._reader.close()
        self._writer.close()

    def _let_go(self) -> None:
        """Close the connections before a fork, unless the file is closed or a fork comes from within a transaction."""
        if not (_is_closed(self._writer) or self._writer.in_transaction or self._reader.in_transaction):
            self._close()
            self._is_let_go = True

    def _begin_anew(self) -> None:
        self._writing_thread = None
        self._is_lost = not (self._is_let_go or _is_closed(self._writer))

    def _connect_again(self) -> None:
        if self._is_lost:  # closing what is the parent's would be as wrong as using it
            msg = (
                f"the catalog {self._path} was in use while this process was forked, so the child cannot use it; open "
                "the store after the fork, in each process"
            )
            raise StoreError(msg)
        with self._lock, self._read_lock:
            if self._is_let_go:
                self._is_let_go = False  # what opens it has transactions of its own
                try:
                    self._connect()
                except BaseException:
                    self._is_let_go = True
                    raise

    def _error(self, error: Exception) -> StoreError:
        is_corrupt = type(error) is sqlite3.DatabaseError  # its subclasses are about the call, not about the file
        return (CorruptCatalogError if is_corrupt else StoreError)(f"cannot use the catalog {self._path}: {error}")


def _is_closed(connection: sqlite3.Connection) -> bool:
    try:
        connection.total_changes  # noqa: B018  # raises where it is closed
    except sqlite3.ProgrammingError:
        return True
    return False


def connect(uri: str) -> sqlite3.Connection:
    """Open a file that several threads and processes use; a write waits for the others' for a minute at most."""
    return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def connect_read_only(uri: str) -> sqlite3.Connection:
    """Open a file to be read only, also in a directory that cannot be written to; `sqlite3.Error` if it is none."""
    connection = connect(uri + "?mode=ro")
    try:
        connection.execute("SELECT count(*) FROM chunks WHERE id = 0")
    except sqlite3.OperationalError:  # a WAL database cannot be opened where its helper files cannot be made
        connection.close()
        connection = connect(uri + "?mode=ro&immutable=1")
        connection.execute("SELECT count(*) FROM chunks WHERE id = 0")
    return connection


def damaged(path: Path) -> Path:
    """Return where a damaged catalog is kept."""
    return path.with_name(f"{path.name}.damaged")


def set_aside(path: Path) -> None:
    """Rename a damaged catalog; its helper files would be taken for the new one's."""
    path.replace(damaged(path))
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
