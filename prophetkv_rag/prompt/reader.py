"""Reading a prompt: from what applications pass to its layout.

Every segment is tokenised alone and the ids are joined; full prefill, the baseline everywhere, uses the same ids.
Special-token parsing is off inside chunks: a chunk that holds `<|im_end|>` stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import takewhile

import torch

from prophetkv_rag.errors import InputError
from prophetkv_rag.prompt.chat_messages import plain_messages
from prophetkv_rag.prompt.chunk_index import ChunkIndex
from prophetkv_rag.prompt.layout import ChunkSpan, PromptLayout
from prophetkv_rag.prompt.prompt import AnyPrompt, Prompt, TextOrIds
from prophetkv_rag.prompt.question import find_ids, question_of
from prophetkv_rag.prompt.tokens import Tokens
from prophetkv_rag.store import CacheIdentity
from prophetkv_rag.text import well_formed, well_formed_parts


@dataclass(slots=True)
class _Pieces:
    """Collects segments in order."""

    ids: list[int] = field(default_factory=list)
    chunks: list[ChunkSpan] = field(default_factory=list)

    def add(self, ids: Sequence[int], key: str | None = None) -> None:
        if key is not None:
            self.chunks.append(ChunkSpan(key, len(self.ids), tuple(ids)))
        self.ids.extend(ids)


class PromptReader:
    """Turns what callers pass (a string, chat messages or a `Prompt`) into a `PromptLayout`."""

    def __init__(self, tokens: Tokens, identity: CacheIdentity, chunk_index: ChunkIndex) -> None:
        """Read prompts with this tokenizer, for caches of this identity, finding chunks by this index."""
        self.tokens = tokens
        self.identity = identity
        self.chunk_index = chunk_index

    def read(self, prompt: AnyPrompt, *, query: str | None = None) -> PromptLayout:
        """Lay a prompt out.

        Args:
            prompt: Text used as it is, chat messages (rendered by the chat template), or an explicit `Prompt`.
            query: The question, where the caller knows it; overrides what the prompt suggests.

        Returns:
            The layout; without any known chunk it has no chunks.

        Raises:
            InputError: For an empty prompt or chunk, or text without a tokenizer.
        """
        query = well_formed_parts(query)
        if isinstance(prompt, Prompt):
            parts = {part.name: well_formed_parts(getattr(prompt, part.name)) for part in fields(prompt)}
            return self._read_parts(Prompt(**parts), query)
        if isinstance(prompt, str):
            return self._read_text(well_formed(prompt), query)
        messages = plain_messages(well_formed_parts(list(prompt)))
        text = self.tokens.render(messages)
        return self._read_text(text, query if query is not None else question_of(messages, self.chunk_index))

    def _read_parts(self, prompt: Prompt, query: str | None) -> PromptLayout:
        pieces = _Pieces()
        fresh = self.tokens.fresh(prompt.prefix, first=True)
        glue = self.tokens.fresh(prompt.glue)
        if len(prompt.leads) not in (0, len(prompt.chunks)):
            msg = f"the prompt has {len(prompt.leads)} leads, {len(prompt.chunks)} chunks; give one for each, or none"
            raise InputError(msg)
        for number, chunk in enumerate(prompt.chunks):
            if prompt.leads:
                fresh = [*fresh, *self.tokens.fresh(prompt.leads[number])]
            if isinstance(chunk, str):
                text = chunk.strip()
                lead, tail = chunk[: len(chunk) - len(chunk.lstrip())], chunk[len(chunk.rstrip()) :]
                if not text:
                    msg = f"chunk {number} of the prompt is empty; leave it out"
                    raise InputError(msg)
                fresh = [*fresh, *self.tokens.fresh(lead)]
                chunk_ids, after = self.tokens.chunk(text), self.tokens.fresh(tail)
            else:
                chunk_ids, after = [int(token) for token in chunk], []
                if not chunk_ids:
                    msg = f"chunk {number} of the prompt is empty; leave it out"
                    raise InputError(msg)
            pieces.add(fresh)
            pieces.add(chunk_ids, self.identity.key(chunk_ids))
            fresh = after if number == len(prompt.chunks) - 1 else [*after, *glue]
        pieces.add(fresh)
        suffix_start = len(pieces.ids)
        pieces.add(self.tokens.fresh(prompt.suffix))
        question: TextOrIds | None = query if query is not None else prompt.query
        if isinstance(question, str) and isinstance(prompt.suffix, str):
            return self._finish(pieces, suffix_start, prompt.suffix, question)
        if question is None:
            return self._finish(pieces, suffix_start, "", None)
        question_ids = self.tokens.fresh(question)
        rows = find_ids(pieces.ids[suffix_start:], question_ids)
        if rows is None:
            return self._layout(pieces, probe_ids=tuple(question_ids))
        return self._layout(pieces, question_rows=tuple(suffix_start + row for row in rows))

    def _read_text(self, text: str, query: str | None) -> PromptLayout:
        if not text.strip():
            msg = "the prompt is empty; give at least one character of text"
            raise InputError(msg)
        pieces, cursor = _Pieces(), 0
        for match in self.chunk_index.find(text):
            pieces.add(self.tokens.fresh(text[cursor : match.start], first=cursor == 0))
            ids = self.tokens.chunk(text[match.start : match.end])
            pieces.add(ids, self.identity.key(ids))
            cursor = match.end
        suffix_start = len(pieces.ids)
        suffix = text[cursor:]
        pieces.add(self.tokens.fresh(suffix, first=cursor == 0))
        return self._finish(pieces, suffix_start, suffix, query)

    def _finish(self, pieces: _Pieces, suffix_start: int, suffix: str, query: str | None) -> PromptLayout:
        if not pieces.chunks or query is None or not query.strip():
            return self._layout(pieces)
        query = query.strip()
        at = suffix.rfind(query)
        if at < 0:
            return self._layout(pieces, probe_ids=tuple(self.tokens.fresh(query)))
        rows = self.tokens.rows_of_span(suffix, at, at + len(query))
        return self._layout(pieces, question_rows=tuple(suffix_start + row for row in rows))

    def _layout(
        self, pieces: _Pieces, *, question_rows: tuple[int, ...] = (), probe_ids: tuple[int, ...] = ()
    ) -> PromptLayout:
        if not pieces.ids:
            msg = "the prompt is empty; give at least one token"
            raise InputError(msg)
        prefix = tuple(pieces.ids[: pieces.chunks[0].start]) if pieces.chunks else ()
        return PromptLayout(
            input_ids=torch.tensor(pieces.ids, dtype=torch.int64),
            chunks=tuple(pieces.chunks),
            question_rows=question_rows,
            probe_ids=probe_ids,
            known_prefix=shared_length(prefix, self.identity.prefix_ids),
            exact_first_chunk=bool(pieces.chunks) and prefix == self.identity.prefix_ids,
            marks=self.tokens.marks(pieces.ids),
        )


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their starts."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
