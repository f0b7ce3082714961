"""Putting the rows of one prompt into a tree: what others have already is shared, and made better where it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prophetkv_rag.conversations.rows import KeysBefore, RowState, Trace
from prophetkv_rag.conversations.tree import Node, Rows, path_of


@dataclass(frozen=True, slots=True)
class NewRows:
    """A prompt's L rows, or those of them from a position on.

    Attributes:
        token_ids: `[L]`, int64.
        states: `[L]`, uint8.
        traces: In order of position.
        prompts: (Length, settings) of the prompts that end among them.
        layers: `keys` `[1, Hkv, M, D]` and `values` alike, M at least L - `first`.
        copies: Whether somebody goes on to use the layers; else they may be kept as they are.
        first: Position of the first row that the layers have; those before it must be in the tree.
        moved: Keys of rows that were moved, as they were computed; they are kept so.
    """

    token_ids: torch.Tensor
    states: torch.Tensor
    traces: Sequence[Trace]
    prompts: frozenset[tuple[int, str]]
    layers: Sequence[Any]
    copies: bool
    first: int = 0
    moved: Sequence[KeysBefore] = ()


def insert(root: Node, new: NewRows, used: int) -> None:
    """Put rows into a tree.

    Args:
        root: Its root.
        new: The rows.
        used: The time, for `Node.used`.
    """
    length = int(new.token_ids.shape[0])
    node = root
    for node, shared in path_of(root, new.token_ids):
        if node.start + shared < min(node.stop, length):
            node.split(shared)
        node.used = max(node.used, used)
        _improve(node, new)
        stop = min(node.stop, length)
        node.prompts |= {prompt for prompt in new.prompts if node.start < prompt[0] <= stop}
        there = set(node.traces)
        node.traces += [trace for trace in new.traces if node.start <= trace.start < stop and trace not in there]
    start = node.stop
    if start >= length or start < new.first:
        return
    leaf = Node(
        start,
        new.token_ids[start:].clone(),
        new.states[start:].clone(),
        [_owned(layer, start - new.first, length - new.first, new.copies) for layer in new.layers],
        [trace for trace in new.traces if start <= trace.start < length],
        node,
        prompts={prompt for prompt in new.prompts if start < prompt[0] <= length},
        used=used,
    )
    is_moved = leaf.states == int(RowState.MOVED)
    _put_back(leaf.rows, leaf.shifts, start, is_moved.nonzero()[:, 0] + start, new.moved)
    node.children[int(leaf.token_ids[0])] = leaf


def _improve(node: Node, new: NewRows) -> None:
    """Take over the rows that are closer to full prefill than those held, such as stale ones recomputed since."""
    first = max(node.start, new.first)
    theirs = new.states[first : node.stop]
    better = (theirs > node.states[first - node.start :][: theirs.shape[0]]).nonzero()[:, 0] + first
    if better.shape[0]:
        for layer, (keys, values) in zip(new.layers, node.rows, strict=True):
            for held, part in ((keys, layer.keys), (values, layer.values)):
                held[:, better - node.start] = part[0, :, (better - new.first).to(part.device)].to("cpu")
        node.states[better - node.start] = new.states[better]
        node.shifts[better - node.start] = 0
        is_moved = new.states[better] == int(RowState.MOVED)
        _put_back(node.rows, node.shifts, node.start, better[is_moved], new.moved)


def _put_back(
    rows: Rows, shifts: torch.Tensor, first: int, positions: torch.Tensor, moved: Sequence[KeysBefore]
) -> None:
    """Give the rows at these positions the keys that were computed, and what turns them to where they stand."""
    for run in moved:
        here = positions[(positions >= run.start) & (positions < run.start + run.shifts.shape[0])]
        for (keys, _), before in zip(rows, run.keys, strict=True):
            keys[:, here - first] = before[:, here - run.start]
        shifts[here - first] = run.shifts[here - run.start]


def _owned(layer: Any, start: int, stop: int, copies: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's rows on the CPU in memory of their own: as they are where that is all they hold, else copied."""
    keys, values = (_own(part[0, :, start:stop].detach(), copies) for part in (layer.keys, layer.values))
    return keys, values


def _own(rows: torch.Tensor, copies: bool) -> torch.Tensor:
    if rows.device.type != "cpu":
        return rows.cpu().contiguous()
    is_whole = rows.is_contiguous() and rows.untyped_storage().nbytes() == rows.nbytes
    return rows if is_whole and not copies else rows.clone(memory_format=torch.contiguous_format)
