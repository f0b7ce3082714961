"""A prompt that begins as a former one: how much of that one's rows is taken over, and what is said of them after.

Positions and tokens are the former ones, so nothing is rotated: the rows are copied. Chunks among them are not loaded
again. Those of their tokens that were never recomputed may be chosen by the new question; the rest stays as it is.
Where other chunks stand in a prompt than did, what followed them is found at its new positions, as stale as a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch

from prophetkv_rag.conversations import (
    SHORTEST,
    AnsweredRows,
    ConversationTier,
    HeldRows,
    KeysBefore,
    MovedRows,
    RowState,
    Trace,
    states_after,
)
from prophetkv_rag.model import ModelSupport, RowsLayer
from prophetkv_rag.prompt import ChunkSpan, MovedSpan, PromptLayout
from prophetkv_rag.reuse.selection import QueryContext, Selection, Strategy

RECENT = 128
"""So many of the latest tokens of a history that moved are computed all the same: a question refers to them first.

Without it moved messages cost fidelity (benchmarks/quality/moved_messages.py); so many are computed in any turn,
however long the history gets.
"""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a prompt takes over, and where what comes of it is kept; `tier` is `None` where nothing is remembered.

    `held` is what it begins with, `moved` what stood elsewhere.
    `is_repeated` is said of a prompt that was answered before by the same settings, whose rows are all there: nothing
    is chosen, so that its answer is the former one's.
    """

    tier: ConversationTier | None
    tenant: str
    held: HeldRows
    deletable: frozenset[str] = frozenset()
    settings: str = ""
    is_repeated: bool = False
    moved: Sequence[MovedRows] = ()

    @classmethod
    def none(cls) -> Continuation:
        """Return that of a prompt that neither takes from former ones nor is kept."""
        return cls(None, "", HeldRows.none())

    @classmethod
    def of(
        cls, layout: PromptLayout, tier: ConversationTier | None, tenant: str, strategy: Strategy, ratio: float | None
    ) -> Continuation:
        """Look up what a prompt begins with.

        Args:
            layout: The prompt.
            tier: Former prompts.
            tenant: Whose prompt it is.
            strategy: Chooses what is recomputed.
            ratio: Its budget; `None` for a default, which is some. Full prefill, the control, takes over nothing.
        """
        if tier is None:
            return cls.none()
        takes = strategy.uses_caches and ratio != 1
        held = tier.match(layout.input_ids, tenant) if takes else HeldRows.none()
        asking = (layout.question_rows[:1], layout.question_rows[-1:], layout.probe_ids)
        settings = f"{strategy if is_dataclass(strategy) else strategy.name} {ratio} {asking}"
        is_repeated = (layout.num_tokens, settings) in held.prompts
        held = held.first(_length_of(layout, held, is_asked=ratio != 0 and not is_repeated))
        is_repeated &= held.length == layout.num_tokens - 1
        moved = _moved_behind(layout, tier, tenant, held.length) if takes and not is_repeated else ()
        deletable = tier.deletable(chunk.key for chunk in layout.chunks)
        return cls(tier, tenant, held, deletable, settings, is_repeated, moved)

    @property
    def length(self) -> int:
        """How many rows are taken over from the prompt's beginning on."""
        return self.held.length

    def seen(self, layout: PromptLayout) -> PromptLayout:
        """Return the prompt with what was moved, now or in a former turn, and may be chosen from."""
        is_moved = (self.held.states == int(RowState.MOVED)) & ~layout.is_chunk[: self.length]
        spans = [*_runs(is_moved), *((rows.start, rows.stop) for rows in self.moved)]
        return replace(layout, moved=tuple(MovedSpan(*span) for span in spans)) if spans else layout

    def new_chunks(self, layout: PromptLayout) -> tuple[ChunkSpan, ...]:
        """Return the chunks that must be loaded."""
        return tuple(chunk for chunk in layout.chunks if chunk.start >= self.length)

    def was_alone(self, chunk: ChunkSpan) -> bool:
        """Whether the rows of a chunk that is taken over came from a cache that was encoded behind no other chunk."""
        return all(len(trace.keys) == 1 for trace in self.held.traces if trace.start == chunk.start)

    def put_into(self, layers: Sequence[RowsLayer], support: ModelSupport) -> Sequence[KeysBefore]:
        """Copy the rows that are taken over to their positions; returns the keys of those that moved, as computed."""
        if self.tier is None or not (self.length or self.moved):
            return ()
        return self.tier.put_into(self.held, self.moved, layers, support)

    def keep_copy(self, answered: AnsweredRows | None, layers: Sequence[Any]) -> None:
        """Keep a prompt that has no answer (yet), as far as it is to be kept."""
        if self.tier is not None and answered is not None:
            self.tier.keep(answered, layers, copies=True)

    def is_settled(self, num_tokens: int) -> torch.Tensor:
        """Return `[N]`, bool: rows that are taken over and not recomputed, whatever is chosen."""
        settled = torch.zeros(num_tokens, dtype=torch.bool)
        settled[: self.length] = self.is_repeated | (self.held.states >= int(RowState.COMPUTED))
        return settled

    def answered(
        self,
        layout: PromptLayout,
        ran: torch.Tensor | None = None,
        *,
        visible: torch.Tensor | None = None,
        behind: Mapping[str, Sequence[str]] | None = None,
        moved: Sequence[KeysBefore] = (),
    ) -> AnsweredRows | None:
        """Return what is to be kept of the prompt; `None` if nothing is.

        Args:
            layout: The prompt, as it was `seen`.
            ran: `[m]`, ascending: chunk rows that ran through every layer; `None` for all.
            visible: `[N]`, bool: what those saw; `None` for everything before them.
            behind: For the key of a chunk those of the chunks that left a trace in its cache.
            moved: What `put_into` returned.
        """
        if self.tier is None:
            return None
        is_chunk = layout.is_chunk.clone()
        has_run = torch.zeros_like(is_chunk)
        has_run[ran.cpu() if ran is not None else slice(None)] = True
        is_blind = None if visible is None or ran is None else has_run & is_chunk
        has_run[self.length :] |= ~is_chunk[self.length :]
        is_moved = torch.zeros_like(is_chunk)
        for rows in self.moved:
            is_moved[rows.start : rows.stop] = True
        states = states_after(self.held.states, is_chunk, has_run, is_moved=is_moved, is_blind=is_blind)
        # What nobody can delete (a chunk of this prompt alone) leaves no trace to look after.
        here = [
            Trace(chunk.start, frozenset({chunk.key, *(behind or {}).get(chunk.key, ())}))
            for chunk in layout.chunks
            if chunk.key in self.deletable
        ]
        here += [Trace(rows.start, rows.keys) for rows in self.moved if rows.keys]
        traces = tuple(sorted({*self.held.traces, *here}, key=lambda trace: trace.start))
        return AnsweredRows(layout.input_ids.tolist(), states, traces, self.tenant, self.settings, moved)


def _length_of(layout: PromptLayout, held: HeldRows, *, is_asked: bool) -> int:
    """Return how many of the rows a prompt may take over.

    Its last token is computed, for the logits. A chunk is taken over whole or not at all. A row that a chunk's cache
    gave, of a chunk that is not seen in this prompt, cannot be chosen any more, so rows end before it; nor can one that
    was moved, where no chunk stands before it. And where there is something to choose, the tokens that ask are
    computed.
    """
    length = min(held.length, layout.num_tokens - 1)
    is_stray = held.states[:length] == int(RowState.STALE)
    first = min(length, layout.context_start)
    is_stray[:first] |= held.states[:first] == int(RowState.MOVED)
    stray = (is_stray & ~layout.is_chunk[:length]).nonzero()
    if stray.shape[0]:
        length = int(stray[0])
    for chunk in layout.chunks:
        if chunk.start < length < chunk.stop:
            length = chunk.start
    is_open = bool((held.states[:length] < int(RowState.COMPUTED)).any())
    if is_asked and not layout.probe_ids and layout.chunks and (is_open or layout.chunks[-1].start >= length):
        length = min(length, _first_asking(layout, held, length))
    return length if length > layout.known_prefix else 0


def _moved_behind(layout: PromptLayout, tier: ConversationTier, tenant: str, length: int) -> Sequence[MovedRows]:
    """Find which messages stand elsewhere in former prompts, behind the first chunk's and before the one that asks.

    A prompt without chunks is computed exactly, and so is what stands before them. So are the messages that hold chunks
    or ask: what they say besides is an application's instructions, which are in every prompt and no conversation. And
    so are the latest tokens of the history.

    Args:
        layout: The prompt.
        tier: Former prompts.
        tenant: Whose.
        length: How many rows are taken over from the beginning on.
    """
    stop = layout.num_tokens - SHORTEST  # where nobody says what asks, something does
    if layout.question_rows:
        stop = min(layout.question_rows[0], layout.num_tokens - 1)
    last = max((mark for mark in layout.marks if mark < stop), default=0)
    if not layout.chunks or last <= max(length, layout.chunks[0].stop):
        return ()
    is_free = ~layout.is_chunk
    is_free[: max(length, layout.chunks[0].stop)] = False
    is_free[max(0, last - RECENT) :] = False
    for chunk in layout.chunks:
        is_free[chunk.start : next(mark for mark in (*layout.marks, layout.num_tokens) if mark >= chunk.stop)] = False
    starts = [chunk.start for chunk in layout.chunks]
    return tier.find_moved(layout.input_ids, tenant, is_free, chunk_starts=starts, held=length)


def _runs(mask: torch.Tensor) -> list[tuple[int, int]]:
    """Return where each run of `True` begins and ends."""
    edges = torch.cat([mask.new_zeros(1), mask, mask.new_zeros(1)]).int().diff().nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _first_asking(layout: PromptLayout, held: HeldRows, length: int) -> int:
    """Return the first token that asks.

    It is the question's, where that is known; else what stands behind the last chunk and behind the last prompt that
    was answered, whose question is not this one's.
    """
    if layout.question_rows:
        return layout.question_rows[0]
    ends = [end for end, _ in held.prompts if end <= length and end < layout.num_tokens]
    return max(layout.suffix_start, *ends, 0)


def choose(strategy: Strategy, context: QueryContext, is_settled: torch.Tensor) -> Selection:
    """Let a strategy choose among all chunk tokens, and leave out those that need no recomputation any more.

    So all that it would recompute in a prompt that takes over nothing is recomputed, now or in a former turn.

    Args:
        strategy: Is not asked where there is nothing to choose.
        context: The prompt.
        is_settled: `[N]`, bool: rows taken over that are not stale.
    """
    if not bool((context.is_chunk & ~is_settled).any()):
        return Selection(context.is_chunk.nonzero()[:0, 0])
    found = strategy.select(context)
    return replace(found, positions=found.positions[~is_settled[found.positions]])
