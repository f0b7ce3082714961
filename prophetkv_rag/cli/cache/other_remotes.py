"""Remote tiers that a database had once: what still waits for them, and giving one up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.store.disk import DiskStore


def other_remotes(store: DiskStore, give_up_url: str | None) -> dict[str, int]:
    """Return the remote tiers that a store had once, and the deletes that wait for each; one of them may be given up.

    Raises:
        InputError: If that is none of them.
    """
    from prophetkv_rag.store.remote import give_up, others

    url = None if store.remote is None else store.remote.records.url
    found = others(store.catalog, url)
    if give_up_url is not None:
        if give_up_url not in found:
            known = ", ".join(found) or "there is none"
            msg = f"{give_up_url!r} is no remote tier that these caches had and do not have any more; known: {known}"
            raise InputError(msg)
        give_up(store.catalog, give_up_url)
        del found[give_up_url]
    return found
