"""A part of a tree, copied out of it, to be written to a file and put into another tree."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from prophetkv_rag.conversations.insertion import NewRows
from prophetkv_rag.conversations.rows import KeysBefore, Trace
from prophetkv_rag.conversations.tree import Node, Rows, path_of


class Run(NamedTuple):
    """One node of the tree.

    Attributes:
        parent: Number of the run before it, or -1; parents come first.
        length: Its tokens.
        traces: See `Node`.
        prompts: See `Node`.
        used: Its rank by last use, from 1.
    """

    parent: int
    length: int
    traces: tuple[Trace, ...]
    prompts: frozenset[tuple[int, str]]
    used: int


class _Layer(NamedTuple):
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class SavedRows:
    """Runs of T tokens in all, side by side.

    Attributes:
        runs: In the order of their tokens.
        token_ids: `[T]`, int64.
        states: `[T]`, uint8.
        rows: One (keys `[Hkv, T, D]`, values `[Hkv, T, Dv]`) a layer, rotated to where they were computed.
        shifts: `[T]`, int64; see `Node`.
    """

    runs: Sequence[Run]
    token_ids: torch.Tensor
    states: torch.Tensor
    rows: Rows
    shifts: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_ids.shape[0])

    @classmethod
    def of(cls, root: Node | None, token_ids: torch.Tensor | None = None) -> SavedRows:
        """Copy a tree, or what of it belongs to a prompt; see `ConversationTier.copy_of`."""
        taken = [] if root is None else _wanted(root, token_ids)
        numbers = {id(node): number for number, (node, _) in enumerate(taken)}
        ranks = {used: rank for rank, used in enumerate(sorted({node.used for node, _ in taken}), 1)}
        runs = [
            Run(
                numbers.get(id(node.parent), -1),
                count,
                tuple(trace for trace in node.traces if trace.start < node.start + count),
                frozenset(prompt for prompt in node.prompts if prompt[0] <= node.start + count),
                ranks[node.used],
            )
            for node, count in taken
        ]
        nothing = torch.empty(0, dtype=torch.int64)
        return cls(
            runs,
            torch.cat([nothing, *(node.token_ids[:count] for node, count in taken)]),
            torch.cat([nothing.to(torch.uint8), *(node.states[:count] for node, count in taken)]),
            [
                (
                    torch.cat([node.rows[layer][0][:, :count] for node, count in taken], dim=1),
                    torch.cat([node.rows[layer][1][:, :count] for node, count in taken], dim=1),
                )
                for layer in range(len(taken[0][0].rows) if taken else 0)
            ],
            torch.cat([nothing, *(node.shifts[:count] for node, count in taken)]),
        )

    def without(self, deleted: Collection[str]) -> Iterator[tuple[NewRows, int]]:
        """Yield what can be put into a tree, and when it was used, without what bears the trace of deleted chunks."""
        beginnings: list[tuple[torch.Tensor, int]] = []  # each run's tokens from the first on; where a trace forbids it
        at = 0
        nothing = torch.empty(0, dtype=torch.int64)
        for run in self.runs:
            before, end = beginnings[run.parent] if run.parent >= 0 else (nothing, -1)
            start, stop = int(before.shape[0]), int(before.shape[0]) + run.length
            forbidden = [trace.start for trace in run.traces if not trace.keys.isdisjoint(deleted)]
            if end < 0 and forbidden:
                end = min(forbidden)
            token_ids = torch.cat([before, self.token_ids[at : at + run.length]])
            beginnings.append((token_ids, end))
            length = stop if end < 0 else min(stop, end)
            if length > start:
                states = torch.zeros(length, dtype=torch.uint8)
                states[start:] = self.states[at : at + length - start]
                layers = [
                    _Layer(keys[None, :, at : at + length - start], values[None, :, at : at + length - start])
                    for keys, values in self.rows
                ]
                traces = [trace for trace in run.traces if trace.start < length]
                prompts = frozenset(prompt for prompt in run.prompts if prompt[0] <= length)
                shifts = self.shifts[at : at + length - start]
                moved = [KeysBefore(start, shifts, [layer.keys[0] for layer in layers])]
                new = NewRows(token_ids[:length], states, traces, prompts, layers, True, start, moved)
                yield new, run.used
            at += run.length


def _wanted(root: Node, token_ids: torch.Tensor | None) -> list[tuple[Node, int]]:
    """Return which nodes are wanted, parents first, and how many tokens of each."""
    if token_ids is None:
        return [(node, node.stop - node.start) for node in root.below() if node.parent is not None]
    path = path_of(root, token_ids)
    if path and path[-1][0].start + path[-1][1] == token_ids.shape[0]:
        last = path.pop()[0]
        return [*path, *((node, node.stop - node.start) for node in last.below())]
    return path
