"""Which chunks stand before a chunk in its document, as far as its record says. Pure functions.

LlamaIndex's nodes name the node before them. Others are put in order within what their metadata calls a document: by
page and first character, where that is there, else as they were written.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_NODE = "_node_content"  # as LlamaIndex writes nodes into metadata
_PREVIOUS = "2"  # llama_index.core.schema.NodeRelationship.PREVIOUS
_DOCUMENT = ("ref_doc_id", "document_id", "doc_id", "source", "file_path", "file")
_PAGE = ("page", "page_label", "page_number")
_START = ("start_index", "start_char_idx", "chunk_index")


class Record(NamedTuple):
    """A record of a collection: its id, text and metadata, the document that it is deleted with, and its embedding.

    Those two where there is one, and where it is known.
    """

    name: str
    text: str | None
    metadata: Mapping[str, Any] | None
    document: str = ""
    embedding: Sequence[float] | None = None


Fetch = Callable[[Sequence[str]], Sequence[Record]]
"""Ids -> those of them that the collection holds."""


def previous_texts(records: Sequence[Record], count: int, fetch: Fetch, *, is_one_call: bool) -> dict[str, list[str]]:
    """Return, for each text, those of up to `count` chunks before it, in order.

    Args:
        records: What is written, or looked at, together.
        count: How many chunks are wanted.
        fetch: Finds records that are not among them.
        is_one_call: Whether they were written by one call: without any sign of documents they are one, in order.
    """
    by_name = {record.name: record for record in records}
    previous = _previous_names(records, is_one_call=is_one_call)
    for _ in range(count):
        missing = [name for name in dict.fromkeys(previous.values()) if name not in by_name]
        if not missing:
            break
        found = fetch(missing)
        by_name |= {record.name: record for record in found}
        previous |= _linked(found)
        for name in set(missing).difference(by_name):  # deleted, or never written
            previous = {one: before for one, before in previous.items() if before != name}
    texts: dict[str, list[str]] = {}
    for record in records:
        before: list[str] = []
        name = previous.get(record.name, "")
        while name in by_name and len(before) < count:
            before.append(by_name[name].text or "")
            name = previous.get(name, "")
        if record.text is not None:
            texts.setdefault(record.text, [text for text in reversed(before) if text.strip()])
    return texts


def in_documents(records: Sequence[Record]) -> list[list[str]]:
    """Return the records' texts by document, in order; records without any sign of one are one, as they came."""
    previous = _previous_names(records, is_one_call=True)
    texts = {record.name: record.text or "" for record in records}
    following = {before: name for name, before in previous.items() if before in texts}
    found: list[list[str]] = []
    left = dict.fromkeys(texts)
    starts = [name for name in texts if previous.get(name) not in texts]
    for start in [*starts, *texts]:  # a circle has no start
        document: list[str] = []
        name: str | None = start
        while name is not None and name in left:
            del left[name]
            document.append(texts[name])
            name = following.get(name)
        if kept := [text for text in document if text.strip()]:
            found.append(kept)
    return found


def behind_node(previous_id: str | None) -> dict[str, str]:
    """Return what a record's metadata says where a LlamaIndex node names the one before it, or none."""
    relationships = {} if previous_id is None else {_PREVIOUS: {"node_id": previous_id}}
    return {_NODE: json.dumps({"relationships": relationships})}


def tells_order(records: Sequence[Record]) -> bool:
    """Whether any of these records says which document it is of, so that it may stand behind others or be the first."""
    return any(name in (record.metadata or {}) for record in records for name in (_NODE, *_DOCUMENT))


def _previous_names(records: Sequence[Record], *, is_one_call: bool) -> dict[str, str]:
    previous = _linked(records)
    documents: defaultdict[str, list[tuple[tuple[float, float, int], str]]] = defaultdict(list)
    for number, record in enumerate(records):
        metadata = record.metadata or {}
        document = next((str(metadata[name]) for name in _DOCUMENT if metadata.get(name)), "")
        if _NODE not in metadata and (document or is_one_call):
            order = (_number(metadata, _PAGE), _number(metadata, _START), number)
            documents[document].append((order, record.name))
    for members in documents.values():
        names = [name for _, name in sorted(members)]
        previous |= dict(zip(names[1:], names, strict=False))
    return previous


def _linked(records: Sequence[Record]) -> dict[str, str]:
    """What LlamaIndex's nodes say."""
    previous = {}
    for record in records:
        try:
            before = json.loads((record.metadata or {})[_NODE])["relationships"][_PREVIOUS]["node_id"]
        except (KeyError, TypeError, ValueError):
            continue
        if isinstance(before, str) and before != record.name:
            previous[record.name] = before
    return previous


def _number(metadata: Mapping[str, Any], names: Sequence[str]) -> float:
    for name in names:
        try:
            return float(metadata[name])
        except (KeyError, TypeError, ValueError):
            continue
    return 0.0
