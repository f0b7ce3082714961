"""A tree of rows by token ids: prompts that begin alike share the rows of their common beginning.

A node holds a run of tokens that was never seen to part; where two prompts part, it is cut in two. The idea is that of
RadixAttention (SGLang, arXiv 2312.07104). Not safe for threads by itself: `tier.py` is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch

from prophetkv_rag.conversations.rows import Trace
from prophetkv_rag.model import ModelSupport, RopeTables, RowsLayer

Rows: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]
"""One (keys `[Hkv, n, D]`, rotated to where they were computed, values `[Hkv, n, Dv]`) a decoder layer, on the CPU."""


class Part(NamedTuple):
    """The rows of one node: position of the first, rows, and each row's shift (see `Node`)."""

    start: int
    rows: Rows
    shifts: torch.Tensor


@dataclass(eq=False, slots=True)
class Node:
    """A run of n tokens behind those of its parents.

    Attributes:
        start: Position of the first.
        token_ids: `[n]`, int64.
        states: `[n]`, uint8.
        rows: Their keys and values.
        traces: Of the chunks that begin here.
        parent: `None` for a root, which has no tokens.
        prompts: (Length, settings) of prompts that ended here.
        children: By their first token.
        used: When it was last used, in answers.
        shifts: `[n]`, int64: each row's position minus the one that its keys are rotated to, which is another only
            for rows that were moved. In the dtype of a cache every rotation costs a rounding, so there is one.
    """

    start: int
    token_ids: torch.Tensor
    states: torch.Tensor
    rows: Rows
    traces: list[Trace]
    parent: Node | None
    prompts: set[tuple[int, str]] = field(default_factory=set)
    children: dict[int, Node] = field(default_factory=dict)
    used: int = 0
    shifts: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if self.shifts.shape != self.token_ids.shape:
            self.shifts = torch.zeros_like(self.token_ids)

    @classmethod
    def root(cls) -> Node:
        """Return the beginning of all prompts of a tenant."""
        nothing = torch.empty(0, dtype=torch.int64)
        return cls(0, nothing, nothing.to(torch.uint8), [], [], None)

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + int(self.token_ids.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values."""
        return sum(part.nbytes for pair in self.rows for part in pair)

    @property
    def part(self) -> Part:
        """Its rows as they are now, or get better meanwhile."""
        return Part(self.start, list(self.rows), self.shifts)

    def below(self) -> Iterator[Node]:
        """Yield the node and all behind it."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def shared_with(self, token_ids: torch.Tensor) -> int:
        """Return how many of the node's tokens a prompt has at their positions, from the first on."""
        theirs = token_ids[self.start : self.stop]
        differs = (self.token_ids[: theirs.shape[0]] != theirs).nonzero()
        return int(differs[0]) if differs.shape[0] else int(theirs.shape[0])

    def cut(self, length: int) -> None:
        """Keep the first rows alone; what stood behind them is gone, and so is its memory."""
        assert length > 0
        self.token_ids, self.states = self.token_ids[:length].clone(), self.states[:length].clone()
        self.shifts = self.shifts[:length].clone()
        self.rows = [(keys[:, :length].clone(), values[:, :length].clone()) for keys, values in self.rows]
        self._end()
        self.children = {}

    def split(self, length: int) -> None:
        """Put the rows behind the first ones into a child of their own; each half owns its memory."""
        rest = Node(
            self.start + length,
            self.token_ids[length:].clone(),
            self.states[length:].clone(),
            [],
            [trace for trace in self.traces if trace.start >= self.start + length],
            self,
            {prompt for prompt in self.prompts if prompt[0] > self.start + length},
            self.children,
            self.used,
            self.shifts[length:].clone(),
        )
        for child in rest.children.values():
            child.parent = rest
        for layer, (keys, values) in enumerate(self.rows):  # one layer at a time is there twice
            rest.rows.append((keys[:, length:].clone(), values[:, length:].clone()))
            self.rows[layer] = (keys[:, :length].clone(), values[:, :length].clone())
        self.token_ids, self.states = self.token_ids[:length].clone(), self.states[:length].clone()
        self.shifts = self.shifts[:length].clone()
        self._end()
        self.children = {int(rest.token_ids[0]): rest}

    def _end(self) -> None:
        self.traces = [trace for trace in self.traces if trace.start < self.stop]
        self.prompts = {prompt for prompt in self.prompts if prompt[0] <= self.stop}

    def remove(self) -> None:
        """Take the node, and all behind it, out of the tree."""
        assert self.parent is not None
        self.parent.children.pop(int(self.token_ids[0]), None)
        self.parent = None


def path_of(root: Node, token_ids: torch.Tensor) -> list[tuple[Node, int]]:
    """Return the nodes that a prompt begins with, and how many tokens of each it has: all, but perhaps of the last."""
    found: list[tuple[Node, int]] = []
    node, position = root, 0
    while position < token_ids.shape[0]:
        child = node.children.get(int(token_ids[position]))
        if child is None:
            break
        shared = child.shared_with(token_ids)
        found.append((child, shared))
        node, position = child, position + shared
        if position < child.stop:
            break
    return found


@dataclass(frozen=True, slots=True)
class HeldRows:
    """The rows that a prompt begins with, as a former one had them.

    Attributes:
        states: `[R]`, uint8.
        traces: In order of position, all before R.
        prompts: (Length, settings) of the prompts that ended among them.
        parts: Of each run; the last may be longer than is wanted.
    """

    states: torch.Tensor
    traces: tuple[Trace, ...] = ()
    prompts: frozenset[tuple[int, str]] = frozenset()
    parts: Sequence[Part] = ()

    @classmethod
    def none(cls) -> HeldRows:
        """Return what a prompt has that begins like no other."""
        return cls(torch.empty(0, dtype=torch.uint8))

    @property
    def length(self) -> int:
        """R."""
        return int(self.states.shape[0])

    def first(self, length: int) -> HeldRows:
        """Return the first rows alone."""
        if length >= self.length:
            return self
        if length <= 0:
            return HeldRows.none()
        return HeldRows(
            self.states[:length],
            tuple(trace for trace in self.traces if trace.start < length),
            frozenset(prompt for prompt in self.prompts if prompt[0] <= length),
            [part for part in self.parts if part.start < length],
        )

    def put_into(self, layers: Sequence[RowsLayer], support: ModelSupport) -> None:
        """Copy the rows to their positions, which are those that they had."""
        for start, rows, shifts in self.parts:
            count = min(self.length - start, shifts.shape[0])
            moved = shifts[:count].nonzero()[:, 0]
            tables = RopeTables(shifts[moved])
            for layer, (keys, values), found in zip(layers, rows, support.layers, strict=True):
                layer.keys[0, :, start : start + count] = keys[:, :count].to(layer.keys.device)
                layer.values[0, :, start : start + count] = values[:, :count].to(layer.values.device)
                if moved.shape[0]:
                    turned = tables.rotate(keys[:, moved], found.rotation)
                    layer.keys[0, :, (start + moved).to(layer.keys.device)] = turned.to(layer.keys.device)
