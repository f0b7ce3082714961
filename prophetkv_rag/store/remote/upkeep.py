"""Looking after a remote tier: the parts of `verify`, `gc` and `clear` that concern it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store.remote.tier import RemoteTier


@dataclass(frozen=True, slots=True)
class RemoteCheck:
    """What checking found: keys of bad and of missing blobs; `error` says why it could not be checked."""

    checked: int = 0
    bad: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class RemoteCollection:
    """How much was deleted, is still to be deleted, and was left half written."""

    deleted: int = 0
    waiting: int = 0
    orphans: int = 0


def check_remote(tier: RemoteTier, known: Mapping[str, str], *, repair: bool) -> RemoteCheck:
    """Read and check every blob there that the catalog knows; what only other machines know is theirs to check.

    Args:
        tier: The remote.
        known: Key -> fingerprint of the catalog's chunks.
        repair: Delete bad blobs, and forget those that are not there: `push` uploads them again.
    """
    checked, bad = 0, []
    try:
        listed = {blob.key for blob in tier.files.blobs() if known.get(blob.key) == blob.fingerprint}
        missing = [key for key in tier.records.known() if key not in listed]
        for key in sorted(listed):
            try:
                tier.check(tier.files.read(known[key], key), key, known[key])
            except FileNotFoundError:  # deleted meanwhile
                continue
            except BlobError:
                bad.append(key)
            checked += 1
        if repair:
            for key in bad:
                tier.files.remove(known[key], key)
            tier.records.remove([*bad, *missing])
    except Exception as error:  # whatever a file system raises
        return RemoteCheck(checked, tuple(bad), error=f"{tier.files.name}: {type(error).__name__}: {error}")
    return RemoteCheck(checked, tuple(bad), tuple(missing))


def collect_remote(tier: RemoteTier, grace_s: float) -> RemoteCollection:
    """Delete what is to be deleted there, remove what was left half written, and count what is there."""
    before = tier.stats().deletes
    settle_remote(tier)
    orphans = 0
    try:
        if tier.uploads is not None and not tier.writes.is_open:
            orphans = tier.files.sweep(grace_s)
            tier.uploads.recount()
    except Exception as error:  # whatever a file system raises
        tier.failed(tier.writes, error)
    return RemoteCollection(tier.stats().deletes - before, tier.records.num_to_delete(), orphans)


def settle_remote(tier: RemoteTier) -> None:
    """Do the deletes that are noted, and wait for that, unless the remote does not answer."""
    if tier.uploads is not None:
        tier.uploads.settle()
        tier.uploads.flush()
