"""What a store tells of itself: what it holds and how it was used, and what checking its blobs came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RemoteStats:
    """A remote tier: what the catalog knows to be there, and counts since the store was opened.

    Attributes:
        url: Without a password.
        chunks, nbytes: Of this store's catalog.
        other_bytes: What else was there when it was listed last (other machines' caches).
        max_bytes: Its limit, or `None`.
        all_hits: Caches that stores on this directory have ever read from there.
        waiting: Uploads and deletes that are still to be done.
        is_answering: Whether its last call did not fail.
        hits, misses, bad: Reads, by what came of them; `bad` failed its checks.
        failures: Calls that raised or took too long.
        uploads, deletes: Blobs written and removed.
    """

    url: str
    chunks: int
    nbytes: int
    other_bytes: int
    max_bytes: int | None
    all_hits: int
    waiting: int
    is_answering: bool
    hits: int = 0
    misses: int = 0
    bad: int = 0
    failures: int = 0
    uploads: int = 0
    deletes: int = 0


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts since the store was opened, and what it holds now."""

    chunks: int
    tokens: int
    nbytes: int
    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    location: str = "memory"
    remote: RemoteStats | None = None
    ram_hits: int = 0
    """Hits that needed no file."""
    remote_hits: int = 0
    """Hits that had to be brought from the remote tier; all others but `ram_hits` came from the disk."""
    evictions: int = 0
    """Caches that had to make room for others on disk."""
    failed_writes: int = 0
    """Caches that were wanted and could not be written: see `Failures`."""
    ram_nbytes: int = 0
    """K/V bytes held in RAM in front of the disk."""
    ram_max_nbytes: int | None = None
    """Limit of `ram_nbytes`."""
    max_nbytes: int | None = None
    """Limit of `nbytes`."""
    namespace_max_nbytes: int | None = None
    """Limit of the bytes of each namespace."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of checking every blob. Only `bad` would ever matter to an answer, and such blobs are never used."""

    checked: int
    bad: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    repaired: bool = False
    catalog: str = ""
    """What is wrong with the catalog itself; "" for nothing."""
    remote_checked: int = 0
    remote_bad: tuple[str, ...] = ()
    remote_missing: tuple[str, ...] = ()
    remote_error: str = ""
    """Why the remote tier could not be checked; "" if it was, or there is none."""

    @property
    def num_faults(self) -> int:
        """How much was found."""
        lists = (self.bad, self.missing, self.orphans, self.remote_bad, self.remote_missing)
        return sum(map(len, lists)) + bool(self.catalog) + bool(self.remote_error)
