"""Where caches go that a full or failing disk does not take: to the remote tier alone."""

from __future__ import annotations

from dataclasses import replace

from prophetkv_rag.errors import StoreError
from prophetkv_rag.store import Failures, TextEntry
from prophetkv_rag.store.catalog import Catalog, CatalogRow
from prophetkv_rag.store.remote.tier import RemoteTier
from prophetkv_rag.store.remote.uploads import Uploads


class Elsewhere:
    """Uploads what could not be written to the disk, as long as the catalog can still be written to.

    What it cannot note is not uploaded: nobody could tell later that it has to be deleted there.

    Args:
        catalog: Knows the chunk from then on.
        tier: The remote.
        uploads: What writes there.
        failures: Told that the disk fails; it is said once.

    Attributes:
        is_needed: Whether the last write to the disk failed.
        why_not: Why what failed last was not uploaded either.
    """

    def __init__(self, catalog: Catalog, tier: RemoteTier, uploads: Uploads, failures: Failures) -> None:
        self._catalog = catalog
        self._tier = tier
        self._uploads = uploads
        self._failures = failures
        self.is_needed = False
        self.why_not = ""

    def keep(self, row: CatalogRow, entry: TextEntry | None, data: bytes, error: Exception) -> bool:
        """Upload a blob that could not be written because of `error`; returns whether it is on its way."""
        self.is_needed, self.why_not = True, ""
        if not (self._is_noted(row, entry) or self._is_noted(row, entry)):  # the first failure may have made room
            self.why_not = "the catalog cannot note it, so nobody would know that it is to be deleted there some day"
            return False
        if not self._uploads.offer(row.key, row.fingerprint, data) or self._tier.writes.is_open:
            self.why_not = "that does not answer, or too much is waiting for it"
            return False
        self._failures.note_elsewhere(error, self._tier.files.name)
        return True

    def _is_noted(self, row: CatalogRow, entry: TextEntry | None) -> bool:
        try:
            self._catalog.upsert(replace(row, nbytes=0), entry)
        except StoreError:
            return False
        return True
