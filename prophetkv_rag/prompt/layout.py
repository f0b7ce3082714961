"""A prompt laid out: which token stands where, which of them come from chunk caches, and which ask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prophetkv_rag.errors import ContextWindowError
from prophetkv_rag.once import once


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """One chunk in the prompt: its cache key, its first position and its token ids."""

    key: str
    start: int
    input_ids: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Position after the chunk's last token."""
        return self.start + len(self.input_ids)


@dataclass(frozen=True, slots=True)
class MovedSpan:
    """Tokens of former messages, from `start` up to `stop`, whose rows come from where they stood before."""

    start: int
    stop: int


@dataclass(frozen=True)
class PromptLayout:
    """Token ids and roles of a whole prompt of N tokens.

    Attributes:
        input_ids: `[N]`, int64, on the CPU.
        chunks: The chunks in order of position.
        question_rows: Positions of the question inside the suffix, where they are known; else empty.
        probe_ids: Tokens of a question that stands elsewhere in the prompt; they ask in stage I from behind the
            prompt's end. Empty when the suffix itself asks.
        known_prefix: How many of the first tokens, before the context, are those of the encoding prefix, whose rows
            were computed once for all.
        exact_first_chunk: Whether the first chunk follows exactly the prefix that chunks are encoded behind.
        marks: Positions of control tokens, such as a chat template puts around messages.
        moved: In order of position, all behind the first chunk: what is taken from former prompts and as stale as the
            chunks, so it is chosen from like them.
    """

    input_ids: torch.Tensor
    chunks: tuple[ChunkSpan, ...]
    question_rows: tuple[int, ...] = ()
    probe_ids: tuple[int, ...] = ()
    known_prefix: int = 0
    exact_first_chunk: bool = False
    marks: tuple[int, ...] = ()
    moved: tuple[MovedSpan, ...] = ()

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.input_ids.shape[0])

    @once
    def is_chunk(self) -> torch.Tensor:
        """`[N]` bool: tokens whose rows come from a chunk cache, or from elsewhere in a former prompt.

        A prompt that ends with a chunk still needs its last token computed; that token does not count.
        """
        mask = torch.zeros(self.num_tokens, dtype=torch.bool)
        for span in self.spans:
            mask[span.start : span.stop] = True
        mask[-1] = False
        return mask

    @once
    def spans(self) -> tuple[ChunkSpan | MovedSpan, ...]:
        """Chunks and moved messages in order of position."""
        return tuple(sorted((*self.chunks, *self.moved), key=lambda span: span.start))

    @property
    def context_start(self) -> int:
        """Position of the first chunk token; everything before is the prefix, computed exactly."""
        return self.chunks[0].start if self.chunks else self.num_tokens

    @property
    def suffix_start(self) -> int:
        """First position after the last chunk or moved message (at most N - 1)."""
        return min(self.spans[-1].stop, self.num_tokens - 1) if self.spans else 0

    @property
    def num_chunk_tokens(self) -> int:
        """Tokens inside chunks and moved messages."""
        return sum(span.stop - span.start for span in self.spans)

    def check_fits(self, context_window: int, *, is_reuse: bool, is_answered: bool) -> None:
        """Raise `ContextWindowError` if the prompt is too long for the window.

        Args:
            context_window: Most positions.
            is_reuse: Whether stage I runs, where `probe_ids` take positions behind the prompt's end.
            is_answered: Whether there must be room for an answer.
        """
        probe_rows = len(self.probe_ids) if is_reuse else 0
        if self.num_tokens + probe_rows > context_window:
            asking = f", and its question asks in {probe_rows} more rows behind it," if probe_rows else ""
            problem = f"the prompt has {self.num_tokens} tokens{asking} but the context window is {context_window}"
        elif is_answered and self.num_tokens == context_window:
            problem = f"the prompt fills the context window of {context_window} tokens, so no answer fits"
        else:
            return
        remedy = "retrieve fewer or smaller chunks (similarity_top_k, chunk_size) or use a model with a longer window"
        msg = f"{problem}; {remedy}"
        raise ContextWindowError(msg)
