"""Chroma's records as columns: what it accepts as arguments, and our key in its metadata. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.text import well_formed, well_formed_parts

PROPHETKV_ID = "prophetkv_id"
"""Metadata key under which Chroma holds a record's cache key."""


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """What the collection holds of a record that matters here."""

    key: str | None
    document: str | None
    metadata: Mapping[str, Any] | None = None


def as_list(one_or_many: Any) -> list[Any]:
    """Chroma's `OneOrMany`: one string or one dictionary stands for a list of one."""
    return [one_or_many] if isinstance(one_or_many, (str, Mapping)) else list(one_or_many)


def as_records(ids: Any, metadatas: Any, documents: Any) -> tuple[list[str], list[Any], list[str | None]] | None:
    """Unify a write's arguments into columns of one length, texts and metadata well-formed.

    Returns:
        Ids, metadata or `None` for each, text or `None` for each; or `None` if Chroma will refuse the arguments.

    Raises:
        InputError: If an id is not valid Unicode; another one would not be found by it again.
    """
    if ids is None:
        return None
    metadatas, documents = well_formed_parts(metadatas), well_formed_parts(documents)
    names = as_list(ids)
    metadata_list = [None] * len(names) if metadatas is None else as_list(metadatas)
    document_list = [None] * len(names) if documents is None else as_list(documents)
    is_valid = (
        len(names) == len(metadata_list) == len(document_list) == len(set(map(str, names))) > 0
        and all(isinstance(name, str) for name in names)
        and all(metadata is None or isinstance(metadata, Mapping) for metadata in metadata_list)
        and all(document is None or isinstance(document, str) for document in document_list)
    )
    for name in names if is_valid else ():
        if well_formed(name) != name:
            msg = f"the id {name!a} is not valid Unicode (half of a surrogate pair), so it cannot be stored; rename it"
            raise InputError(msg)
    return (names, metadata_list, document_list) if is_valid else None


def with_key(
    metadata: Mapping[str, Any] | None, text: str | None, keys: Mapping[str, str | None], *, clears: bool
) -> dict[str, Any] | None:
    """Copy a record's metadata with the cache key of its text in it.

    Args:
        metadata: The caller's; a key of ours in it is ignored.
        text: The text that the record is about to get, or `None` if it keeps the one it has, and its key.
        keys: Text -> cache key, or `None` for a text that has no cache.
        clears: Whether the write merges into existing metadata, so that a key that is not wanted must be cleared.
    """
    merged = {name: value for name, value in (metadata or {}).items() if name != PROPHETKV_ID}
    if text is not None and (keys[text] is not None or clears):
        merged[PROPHETKV_ID] = keys[text]
    return merged or None  # Chroma refuses {}


def asked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a read's keyword arguments with texts and filters well-formed, as the records are that they look for."""
    texts = ("query_texts", "where", "where_document")
    return {name: well_formed_parts(value) if name in texts else value for name, value in arguments.items()}


def column_parts(columns: Mapping[str, Any], part: range, num_records: int) -> dict[str, Any]:
    """Slice every column; a part that is everything is left alone, as one record's embedding may be no list of them."""
    parts = dict(columns)
    if len(part) < num_records:
        parts = {n: c if c is None else c[part.start : part.stop] for n, c in columns.items()}
    if not any(parts["metadatas"]):
        parts["metadatas"] = None
    return parts


def cache_keys(metadatas: Iterable[Mapping[str, Any] | None]) -> list[Any]:
    """Return the values of our key in these metadata, in order, each once."""
    found = (metadata[PROPHETKV_ID] for metadata in metadatas if metadata and PROPHETKV_ID in metadata)
    return list(dict.fromkeys(found))


def stripped(result: Any) -> Any:
    """Take our key out of a result of `get`, `peek`, `query` or `search`, in place, and return it."""
    if result.get("metadatas") is not None:
        result["metadatas"] = _without_key(result["metadatas"])
    return result


def _without_key(metadata: Any) -> Any:
    if isinstance(metadata, list):  # of records, or (for several queries) of lists of them
        return [_without_key(part) for part in metadata]
    if metadata is None:
        return None
    return {name: value for name, value in metadata.items() if name != PROPHETKV_ID} or None  # as Chroma has it
