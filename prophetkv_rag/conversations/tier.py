"""The tier of former prompts and answers: bounded, in RAM, apart for every tenant, and true to deletes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prophetkv_rag.conversations.rows import AnsweredRows, RowState
from prophetkv_rag.conversations.tree import HeldRows, Node, path_of
from prophetkv_rag.errors import StoreError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.model import RowsLayer, own_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConversationStats:
    """What is remembered: tenants, runs of tokens that parted from others, tokens, bytes and their limit."""

    tenants: int
    runs: int
    tokens: int
    nbytes: int
    max_nbytes: int


class ConversationTier:
    """Keeps the rows of former prompts and answers, and gives those that a new prompt begins with.

    Every method may be called from any thread. Rows are shared between prompts of one tenant that begin alike; those of
    another tenant are neither found nor counted on. Where room is wanted the least recently used runs go first, ends
    before beginnings, and only of tenants that hold more than their equal share.
    """

    def __init__(self, max_bytes: int, known: Callable[[Collection[str]], set[str]], found: Container[str]) -> None:
        """Begin with nothing.

        Args:
            max_bytes: Most bytes of keys and values.
            known: Returns those keys that are still chunks of the store; a `StoreError` is taken for none.
            found: Keys of the chunks that prompts are searched for, those too that the store does not know yet.
        """
        self.max_bytes = max_bytes
        self._known, self._found = known, found
        self._lock = threading.Lock()
        around_fork(self, "_lock")
        self._roots: dict[str, Node] = {}
        self._stored: set[str] = set()  # keys that the store was seen to know
        self._clock = 0

    def match(self, token_ids: torch.Tensor, tenant: str) -> HeldRows:
        """Return the rows that a prompt (`[N]`, int64) begins with: the longest beginning that is remembered."""
        self.drop_deleted()
        with self._lock:
            path = path_of(self._roots[tenant], token_ids) if tenant in self._roots else []
            if not path:
                return HeldRows.none()
            length = path[-1][0].start + path[-1][1]
            found = HeldRows(
                torch.cat([node.states for node, _ in path]),
                tuple(trace for node, _ in path for trace in node.traces),
                frozenset(prompt for node, _ in path for prompt in node.prompts),
                [(node.start, list(node.rows)) for node, _ in path],
            )
        return found.first(length)

    def put_into(self, held: HeldRows, layers: Sequence[RowsLayer]) -> None:
        """Copy rows that `match` gave into a prompt's cache; none of them is written to meanwhile."""
        with self._lock:
            held.put_into(layers)

    def deletable(self, keys: Iterable[str]) -> frozenset[str]:
        """Return those keys that somebody may delete: of chunks that the store knows, or is about to."""
        keys = set(keys)
        known = self._still_known(keys)
        return frozenset(key for key in keys if key in known or key in self._found)

    @own_state()
    def keep(
        self, answered: AnsweredRows, layers: Sequence[Any], generated: Sequence[int] = (), *, copies: bool = False
    ) -> None:
        """Remember a prompt and its answer, as far as there is room; never raises for want of memory.

        Args:
            answered: The prompt.
            layers: Of its cache, `keys` `[1, Hkv, M, D]` and `values` alike. Rows that are not in every layer, or of
                which no token is known, are left out.
            generated: The answer's tokens.
            copies: Whether the caller goes on to use the layers; else they may be kept as they are.
        """
        token_ids = torch.tensor([*answered.token_ids, *generated], dtype=torch.int64)
        length = min(int(part.shape[-2]) for layer in layers for part in (layer.keys, layer.values))
        length = min(length, int(token_ids.shape[0]))
        deleted = self._deleted({key for trace in answered.traces for key in trace.keys})
        for trace in answered.traces:
            if not deleted.isdisjoint(trace.keys):
                length = min(length, trace.start)
        row_bytes = sum(
            part[:, :, :1].numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values)
        )
        length = min(length, self.max_bytes // max(row_bytes, 1))
        if length <= 0:
            return
        try:
            with self._lock:
                self._insert(answered, layers, token_ids[:length], copies)
                self._make_room()
        except (MemoryError, RuntimeError) as error:  # what torch raises where no memory is left
            logger.warning("a conversation is not remembered: %s", error)

    def _insert(self, answered: AnsweredRows, layers: Sequence[Any], token_ids: torch.Tensor, copies: bool) -> None:
        length = int(token_ids.shape[0])
        num_new = max(0, length - answered.states.shape[0])
        is_exact = bool((answered.states == int(RowState.EXACT)).all())
        state = RowState.EXACT if is_exact else RowState.COMPUTED
        states = torch.cat([answered.states, torch.full((num_new,), int(state), dtype=torch.uint8)])[:length]
        prompt = (answered.states.shape[0], answered.settings)
        root = self._roots.setdefault(answered.tenant, Node.root())
        self._clock += 1
        root.used = self._clock
        node = root
        for node, shared in path_of(root, token_ids):
            if node.start + shared < min(node.stop, length):
                node.split(shared)
            node.used = self._clock
            self._improve(node, layers, states)
            if node.start < prompt[0] <= min(node.stop, length):
                node.prompts.add(prompt)
            there = set(node.traces)
            node.traces += [
                trace for trace in answered.traces if node.start <= trace.start < node.stop and trace not in there
            ]
        start = node.stop
        if start >= length:
            return
        leaf = Node(
            start,
            token_ids[start:].clone(),
            states[start:].clone(),
            [_owned(layer, start, length, copies) for layer in layers],
            [trace for trace in answered.traces if start <= trace.start < length],
            node,
            prompts={prompt} if start < prompt[0] <= length else set(),
            used=self._clock,
        )
        node.children[int(leaf.token_ids[0])] = leaf

    def _improve(self, node: Node, layers: Sequence[Any], states: torch.Tensor) -> None:
        """Take over the rows that are closer to full prefill than those held, such as stale ones recomputed since."""
        count = min(node.stop, int(states.shape[0])) - node.start
        theirs = states[node.start : node.start + count]
        better = (theirs > node.states[:count]).nonzero()[:, 0]
        if better.shape[0]:
            for layer, (keys, values) in zip(layers, node.rows, strict=True):
                keys[:, better] = layer.keys[0, :, node.start + better.to(layer.keys.device)].to("cpu")
                values[:, better] = layer.values[0, :, node.start + better.to(layer.values.device)].to("cpu")
            node.states[better] = theirs[better]

    def _make_room(self) -> None:
        sizes = {tenant: sum(node.nbytes for node in root.below()) for tenant, root in self._roots.items()}
        while (excess := sum(sizes.values()) - self.max_bytes) > 0:
            share = self.max_bytes / len(sizes)
            leaves = [
                (node.used, -node.start, tenant, node)
                for tenant, root in self._roots.items()
                if sizes[tenant] > share
                for node in root.below()
                if not node.children and node.parent is not None
            ]
            _, _, tenant, leaf = min(leaves, key=lambda found: found[:3])
            before, num_rows = leaf.nbytes, int(leaf.token_ids.shape[0])
            kept = num_rows - -(-excess * num_rows // before)
            if leaf.used == self._clock and kept > 0:  # just written: as much of its beginning as fits
                leaf.cut(kept)
                sizes[tenant] -= before - leaf.nbytes
                continue
            sizes[tenant] -= before
            leaf.remove()
            if not self._roots[tenant].children:
                del self._roots[tenant], sizes[tenant]

    def drop_deleted(self) -> None:
        """Drop what bears the trace of chunks that were deleted since, by whatever process."""
        with self._lock:
            held = {
                key for root in self._roots.values() for node in root.below() for t in node.traces for key in t.keys
            }
        if held:
            self.drop(self._deleted(held))
            self._stored &= held

    def drop(self, keys: Iterable[str]) -> None:
        """Drop every row that holds the text of one of these chunks or stands behind it."""
        gone = set(keys)
        if not gone:
            return
        with self._lock:
            for tenant, root in list(self._roots.items()):
                for node in list(root.below()):
                    starts = [trace.start for trace in node.traces if not gone.isdisjoint(trace.keys)]
                    if not starts:
                        continue
                    if min(starts) > node.start:
                        node.cut(min(starts) - node.start)
                    elif node.parent is not None:
                        node.remove()
                if not root.children:
                    del self._roots[tenant]

    def forget(self, tenant: str | None = None) -> None:
        """Forget all conversations, or those of one tenant."""
        with self._lock:
            if tenant is None:
                self._roots.clear()
            else:
                self._roots.pop(tenant, None)

    def tenants(self) -> list[str]:
        """Return those of whom anything is remembered."""
        with self._lock:
            return list(self._roots)

    def stats(self, tenant: str | None = None) -> ConversationStats:
        """Return what is remembered, of all tenants or of one."""
        with self._lock:
            roots = [root for name, root in self._roots.items() if tenant in (None, name)]
            nodes = [node for root in roots for node in root.below() if node.parent is not None]
            return ConversationStats(
                len(roots),
                len(nodes),
                sum(int(node.token_ids.shape[0]) for node in nodes),
                sum(node.nbytes for node in nodes),
                self.max_bytes,
            )

    def _deleted(self, keys: set[str]) -> set[str]:
        """Return those keys whose chunks are gone: from the store, or, where it never knew them, from the index."""
        known = self._still_known(keys)
        return {key for key in keys - known if key in self._stored or key not in self._found}

    def _still_known(self, keys: set[str]) -> set[str]:
        # Never under the lock: the store takes its own, which stand before it (forks.py).
        if not keys:
            return set()
        try:
            known = self._known(keys)
        except StoreError:  # who cannot tell does not use them
            return set()
        self._stored |= known
        return known


def _owned(layer: Any, start: int, stop: int, copies: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's rows on the CPU in memory of their own: as they are where that is all they hold, else copied."""
    keys, values = (_own(part[0, :, start:stop].detach(), copies) for part in (layer.keys, layer.values))
    return keys, values


def _own(rows: torch.Tensor, copies: bool) -> torch.Tensor:
    if rows.device.type != "cpu":
        return rows.cpu().contiguous()
    is_whole = rows.is_contiguous() and rows.untyped_storage().nbytes() == rows.nbytes
    return rows if is_whole and not copies else rows.clone(memory_format=torch.contiguous_format)
