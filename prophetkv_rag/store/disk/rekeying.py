"""Encrypting a directory's caches with another key: also for the first time, and back to none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store.blobs import decode_file
from prophetkv_rag.store.disk.key_mark import must_be_unlocked, write_mark
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.encryption import EncryptionKey, unseal
from prophetkv_rag.store.remote import doom_all


@dataclass(frozen=True, slots=True)
class RekeyReport:
    """Caches written anew, and those that were bad or for which there was no room: they are computed when needed."""

    changed: int = 0
    dropped: int = 0


def rekey(
    store: DiskStore, new_key: EncryptionKey | None, progress: Callable[[int], None] = lambda steps: None
) -> RekeyReport:
    """Encrypt all caches of a store with another key, which is the store's own from then on.

    Other processes must not use the directory meanwhile: they would drop what is not their key's. Interrupted, the
    caches that were not reached are of no key that the directory knows, and are computed again. What a remote tier has
    under the old key is deleted there and uploaded anew, by this store or by the next that has the remote.

    Raises:
        InputError: If the store was not given the key that its caches are encrypted with.
        OSError: If something cannot be written.
    """
    must_be_unlocked(store.files)
    old_key, files = store.files.encryption_key, store.files
    changed = dropped = 0
    with store.directory_lock.exclusive():
        write_mark(store.directory, new_key)
        files.encryption_key = new_key
        with store.catalog.transaction() as run:
            doom_all(run)
        for row in store.catalog.rows():
            path = files.path(row.key)
            if not row.nbytes or not path.exists():
                continue
            data = path.read_bytes()
            try:
                decode_file(data, key=row.key, fingerprint=row.fingerprint, encryption_key=old_key)
                plain = data if old_key is None else unseal(data, old_key, key=row.key)
                is_good = True
            except BlobError:
                is_good = False
            files.remove([row.key])  # before its successor is written: the limit holds at every moment
            store.catalog.mark_lost([row.key])
            # "Used", as the chunk's place in the order of eviction is to stay what it was.
            is_kept = is_good and store.space.write(row, None, files.seal(row.key, plain), is_used=True)
            changed, dropped = changed + is_kept, dropped + (not is_kept)
            progress(1)
    return RekeyReport(changed, dropped)
