"""What each namespace has on disk, for a store that limits that: whose a blob is, and what its owner may still write.

A key holds its namespace (`CacheIdentity.fingerprint`), so a text that two namespaces have is two blobs, each charged
to its own; collections of one namespace that share a blob are charged once, together. A fingerprint that no engine has
described yet (its catalog was lost, and its blobs are of an early version) is charged as a namespace of its own.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from prophetkv_rag.store.catalog.catalog import Catalog


def fingerprints_with(run: sqlite3.Connection, fingerprint: str) -> list[str]:
    """Return all fingerprints (models, settings) of the namespace that a fingerprint belongs to, itself included."""
    found = run.execute(
        "SELECT fingerprint FROM identities WHERE namespace = (SELECT namespace FROM identities WHERE fingerprint = ?)",
        (fingerprint,),
    )
    return [other for (other,) in found] or [fingerprint]


def bytes_of(run: sqlite3.Connection, fingerprints: Sequence[str]) -> int:
    """Return what the blobs of these fingerprints take."""
    query = f"SELECT coalesce(sum(nbytes), 0) FROM fingerprint_bytes WHERE fingerprint IN ({marks(fingerprints)})"
    return int(run.execute(query, tuple(fingerprints)).fetchone()[0])


def marks(values: Sequence[str]) -> str:
    """Return as many question marks, for a list in SQL."""
    return ", ".join("?" * len(values))


def above(run: sqlite3.Connection, max_bytes: int) -> list[tuple[list[str], int]]:
    """Return (fingerprints, bytes too many) of every namespace that has more than `max_bytes`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for fingerprint, namespace in run.execute(
        """SELECT b.fingerprint, i.namespace FROM fingerprint_bytes b
        LEFT JOIN identities i ON i.fingerprint = b.fingerprint"""
    ):
        groups.setdefault(("", fingerprint) if namespace is None else ("of", namespace), []).append(fingerprint)
    sizes = [(fingerprints, bytes_of(run, fingerprints)) for fingerprints in groups.values()]
    return [(fingerprints, nbytes - max_bytes) for fingerprints, nbytes in sizes if nbytes > max_bytes]


def namespace_of(catalog: Catalog, fingerprint: str) -> str | None:
    """Return the namespace that a fingerprint is of, if that is known."""
    with catalog.transaction(is_write=False) as run:
        found = run.execute("SELECT namespace FROM identities WHERE fingerprint = ?", (fingerprint,)).fetchone()
        return None if found is None else str(found[0])


def learn(catalog: Catalog, fingerprint: str, namespace: str | None) -> None:
    """Note what a blob says of its fingerprint, unless that is known; what its model is called, an engine will say."""
    if namespace is not None and namespace_of(catalog, fingerprint) is None:
        catalog.describe(fingerprint, fingerprint, namespace, None)
