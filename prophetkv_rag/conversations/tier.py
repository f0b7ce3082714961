"""The tier of former prompts and answers: bounded, in RAM, apart for every tenant, and true to deletes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prophetkv_rag.conversations.insertion import NewRows, insert
from prophetkv_rag.conversations.moving import MovedRows, find_moved
from prophetkv_rag.conversations.room import make_room
from prophetkv_rag.conversations.rows import AnsweredRows, KeysBefore, RowState
from prophetkv_rag.conversations.saved import SavedRows
from prophetkv_rag.conversations.tree import HeldRows, Node, path_of
from prophetkv_rag.errors import StoreError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.model import ModelSupport, RowsLayer, own_state

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
                [node.part for node, _ in path],
            )
        return found.first(length)

    def find_moved(
        self, token_ids: torch.Tensor, tenant: str, is_free: torch.Tensor, *, chunk_starts: Sequence[int], held: int
    ) -> Sequence[MovedRows]:
        """Return the rows of what former prompts of the tenant have at other positions; see `moving.find_moved`."""
        with self._lock:
            root = self._roots.get(tenant)
            return find_moved(root, token_ids, is_free, chunk_starts=chunk_starts, held=held) if root else ()

    def put_into(
        self, held: HeldRows, moved: Sequence[MovedRows], layers: Sequence[RowsLayer], support: ModelSupport
    ) -> list[KeysBefore]:
        """Copy rows that were found into a prompt's cache; none of them is written to meanwhile.

        Returns:
            The keys of those that moved, as they were computed.
        """
        with self._lock:
            held.put_into(layers, support)
            return [keys for rows in moved for keys in rows.put_into(layers, support)]

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
                make_room(self._roots, self.max_bytes, self._clock)
        except (MemoryError, RuntimeError) as error:  # what torch raises where no memory is left
            logger.warning("a conversation is not remembered: %s", error)

    def _insert(self, answered: AnsweredRows, layers: Sequence[Any], token_ids: torch.Tensor, copies: bool) -> None:
        length = int(token_ids.shape[0])
        num_new = max(0, length - answered.states.shape[0])
        is_exact = bool((answered.states == int(RowState.EXACT)).all())
        state = RowState.EXACT if is_exact else RowState.COMPUTED
        states = torch.cat([answered.states, torch.full((num_new,), int(state), dtype=torch.uint8)])[:length]
        prompts = frozenset({(answered.states.shape[0], answered.settings)})
        root = self._roots.setdefault(answered.tenant, Node.root())
        self._clock += 1
        new = NewRows(token_ids, states, answered.traces, prompts, layers, copies, moved=answered.moved)
        insert(root, new, self._clock)

    def copy_of(self, tenant: str, token_ids: torch.Tensor | None = None) -> SavedRows:
        """Return a copy of what is remembered of a tenant.

        Args:
            tenant: Whose.
            token_ids: `[N]`, int64: only what begins with this prompt; where nothing does, the longest beginning of it
                that is remembered. `None` for all.
        """
        self.drop_deleted()
        with self._lock:
            return SavedRows.of(self._roots.get(tenant), token_ids)

    @own_state()
    def add(self, saved: SavedRows, tenant: str) -> None:
        """Remember what `copy_of` gave, here or elsewhere, as far as there is room and its chunks are still there."""
        deleted = self._deleted({key for run in saved.runs for trace in run.traces for key in trace.keys})
        with self._lock:
            root, begun = self._roots.get(tenant, Node.root()), self._clock
            for new, used in saved.without(deleted):
                insert(root, new, begun + used)
                self._clock = max(self._clock, begun + used)
            if root.children:
                self._roots[tenant] = root
            make_room(self._roots, self.max_bytes, self._clock)

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
