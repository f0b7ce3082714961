"""Messages that stood elsewhere in a former prompt, found by their tokens and put where they stand now.

Retrieved context that changes before the history moves the history. Its rows are as stale then as a chunk's: they were
computed behind other tokens than stand before them now. No copy of them is held for this; the tree is searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from prophetkv_rag.conversations.rows import KeysBefore
from prophetkv_rag.conversations.tree import Node, Part, path_of
from prophetkv_rag.model import ModelSupport, RopeTables, RowsLayer

SHORTEST = 16
"""Tokens that a run must have, to be worth the looking."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MAX_CANDIDATES = 32  # places with the same 16 tokens that are tried, the last used first
_MAX_COMPARISONS = 1_000_000  # tokens compared for one prompt, far beyond any that is not made for it


@dataclass(frozen=True, slots=True)
class MovedRows:
    """A run of a prompt's tokens that a former prompt has elsewhere.

    Attributes:
        start: Its first position here.
        stop: The one behind its last.
        shift: By how much it moved: position here minus position there.
        keys: Of the chunks whose texts its rows hold or attended to.
        parts: Of the nodes that it lies in, by positions there.
    """

    start: int
    stop: int
    shift: int
    keys: frozenset[str]
    parts: Sequence[Part]

    def put_into(self, layers: Sequence[RowsLayer], support: ModelSupport) -> list[KeysBefore]:
        """Copy the rows to their new positions; returns their keys as they were computed.

        Rotations add up, so keys are turned by the difference to where they were computed, once.
        """
        taken = []
        for first, rows, shifts in self.parts:
            begin = max(first, self.start - self.shift)
            end = min(first + rows[0][0].shape[1], self.stop - self.shift)
            device = layers[0].keys.device
            here, there = slice(begin + self.shift, end + self.shift), slice(begin - first, end - first)
            turns = shifts[there] + self.shift
            tables = RopeTables(turns.to(device))
            for layer, (keys, values), found in zip(layers, rows, support.layers, strict=True):
                layer.keys[0, :, here] = tables.rotate(keys[:, there].to(device), found.rotation)
                layer.values[0, :, here] = values[:, there].to(device)
            taken.append(KeysBefore(here.start, turns, [keys[:, there].clone() for keys, _ in rows]))
        return taken


def find_moved(
    root: Node, token_ids: torch.Tensor, is_free: torch.Tensor, *, chunk_starts: Sequence[int], held: int
) -> list[MovedRows]:
    """Find the runs that a tree has at whatever positions: from left to right, the longest at each place.

    Only those before which other chunks stood there than stand here: behind the same ones nothing has to be stale.

    Args:
        root: Of the tenant's tree.
        token_ids: `[N]`, int64: the prompt.
        is_free: `[N]`, bool: where such a run may stand.
        chunk_starts: Where the prompt's chunks begin.
        held: How many rows are taken over from the prompt's beginning on; chunks behind them come from elsewhere.
    """
    ids = token_ids.numpy()
    hashes, is_open = _window_hashes(ids), _whole_windows(is_free.numpy())
    places = np.flatnonzero(is_open)
    if not places.shape[0]:
        return []
    candidates = _candidates(root, np.unique(hashes[places]))
    if not candidates:
        return []
    ends = _ends(is_free.numpy())
    common = {id(root): 0, **{id(node): node.start + count for node, count in path_of(root, token_ids)}}
    found: list[MovedRows] = []
    reached = cost = 0
    for place in places.tolist():
        if place < reached:
            continue
        best: MovedRows | None = None
        for node, start in candidates.get(int(hashes[place]), ())[:_MAX_CANDIDATES]:
            length, last = _extent(node, start, ids[place : ends[place]])
            cost += length + SHORTEST
            is_best = length >= SHORTEST and (best is None or length > best.stop - best.start)
            if is_best and _is_behind_others(last, start, place, chunk_starts, common, held):
                best = _moved(last, start, place, length)
        if best is not None:
            found.append(best)
            reached = best.stop
        if cost > _MAX_COMPARISONS:
            break
    return found


def _candidates(root: Node, wanted: NDArray[np.uint64]) -> dict[int, list[tuple[Node, int]]]:
    """Return where the tree has windows of these hashes: the node of the last token, the position of the first."""
    found: dict[int, list[tuple[Node, int]]] = {}
    for node in sorted(root.below(), key=lambda node: -node.used):
        if node.parent is None:
            continue
        tail = _tail(node.parent, SHORTEST - 1)
        hashes = _window_hashes(np.concatenate([tail, node.token_ids.numpy()]))
        at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        for index in np.flatnonzero(wanted[at] == hashes).tolist():
            found.setdefault(int(hashes[index]), []).append((node, node.start - len(tail) + index))
    return found


def _extent(node: Node, start: int, ids: NDArray[np.int64]) -> tuple[int, Node]:
    """Return how many of these tokens stand in the tree from `start` on, whose window ends in `node`; and where."""
    before = _tail(node.parent, node.start - start) if node.parent is not None and start < node.start else ids[:0]
    if not np.array_equal(before, ids[: len(before)]):
        return 0, node
    length = len(before)
    at = max(0, start - node.start)
    while True:
        own = node.token_ids.numpy()[at:]
        theirs = ids[length : length + len(own)]
        differs = np.flatnonzero(own[: len(theirs)] != theirs)
        length += int(differs[0]) if len(differs) else len(theirs)
        if len(differs) or len(theirs) < len(own) or length == len(ids):
            return length, node
        child = node.children.get(int(ids[length]))
        if child is None:
            return length, node
        node, at = child, 0


def _moved(last: Node, start: int, place: int, length: int) -> MovedRows:
    parts, keys = [], set[str]()
    node: Node | None = last
    while node is not None and node.parent is not None:
        if node.stop > start:
            parts.append(node.part)
        for trace in node.traces:
            if trace.start < start + length:
                keys |= trace.keys
        node = node.parent
    return MovedRows(place, place + length, place - start, frozenset(keys), parts[::-1])


def _is_behind_others(
    last: Node, start: int, place: int, chunk_starts: Sequence[int], common: dict[int, int], held: int
) -> bool:
    """Whether the chunks before a run differ, there (`start`, in the node `last` or before) and here (`place`).

    `common` says for nodes that the prompt begins with how far it does.
    """
    there: list[int] = []
    node: Node | None = last
    while node is not None and id(node) not in common:
        there += [trace.start for trace in node.traces]
        node = node.parent
    assert node is not None
    shared = max(common.values()) if node is last else common[id(node)]  # what the prompt itself said before, or others
    there += [trace.start for trace in node.traces]
    here = min(shared, held)
    return any(shared <= at < start for at in there) or any(here <= at < place for at in chunk_starts)


def _tail(node: Node | None, count: int) -> NDArray[np.int64]:
    """Return the last tokens up to the end of a node."""
    parts: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    while node is not None and count > 0:
        own = node.token_ids.numpy()[-count:]
        parts.append(own)
        count -= len(own)
        node = node.parent
    return np.concatenate(parts[::-1])


def _window_hashes(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Polynomial hash (mod 2^64) of every window."""
    hashes = np.zeros(max(0, len(ids) - SHORTEST + 1), dtype=np.uint64)
    for offset in range(SHORTEST):
        hashes = hashes * _MULTIPLIER + ids[offset : offset + len(hashes)].astype(np.uint64)
    return hashes


def _whole_windows(is_free: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which windows are free from end to end."""
    taken = np.concatenate([[0], np.cumsum(~is_free)])
    return np.asarray(taken[SHORTEST:] == taken[:-SHORTEST]) if len(is_free) >= SHORTEST else np.zeros(0, dtype=bool)


def _ends(is_free: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return for every position the first one at or behind it that is not free."""
    at = np.where(is_free, len(is_free), np.arange(len(is_free)))
    return np.minimum.accumulate(at[::-1])[::-1]
