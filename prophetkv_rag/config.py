"""The settings of the engine: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from prophetkv_rag.errors import InputError

LEAD_IN_TOKENS = 256
"""Longest lead-in by default, in tokens; in a short context window an eighth of it at most."""

REMEMBER_BYTES = 1 << 30
"""Most bytes of former prompts by default: 23,000 tokens of SmolLM2-135M in fp32, 8,000 of Llama-3.1-8B in bf16."""

BATCH_TOKENS = 32_768
"""Most tokens of the prompts under way and their answers by default."""

PLACEHOLDER = re.compile(r"\{context\w*\}")
"""Where the chunks stand in `ProphetKVConfig.prompt_template`."""

EncodingKind = Literal["plain", "previous", "neighbours"]
_DEFAULT_COUNTS: dict[EncodingKind, int] = {"plain": 0, "previous": 2, "neighbours": 3}
_MOST_CHUNKS = 16

ALONE_RATIO = 0.2
"""Share that is recomputed by default of chunks that were encoded alone; the paper's p (arXiv 2602.02579)."""
BEHIND_RATIO = 0.05
"""Share that is recomputed by default of chunks that were encoded behind others; docs/encodings.md says why so few."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """What chunks are encoded behind besides the encoding prefix: so many other chunks, of one kind."""

    kind: EncodingKind
    count: int
    is_order_guessed: bool = True
    """Whether texts that are added in one call, of no known document, follow each other; see `ProphetKVConfig`."""
    otherwise: int = 0
    """So many nearest neighbours stand before a chunk that is its whole document."""

    @property
    def num_neighbours(self) -> int:
        """How many nearest neighbours a chunk may stand behind."""
        return self.count if self.kind == "neighbours" else self.otherwise

    def __str__(self) -> str:
        name = self.kind if self.kind == "plain" else f"{self.kind}:{self.count}"
        return f"{name}+neighbours:{self.otherwise}" if self.otherwise else name


def parse_encoding(text: str) -> Encoding:
    """Read `ProphetKVConfig.encoding`.

    Raises:
        InputError: If it is none.
    """
    if text == "auto":
        return Encoding("previous", _DEFAULT_COUNTS["previous"], is_order_guessed=False)
    match [_one_encoding(part) for part in text.split("+")] if isinstance(text, str) else []:
        case [Encoding() as only]:
            return only
        case [Encoding(kind="previous") as first, Encoding(kind="neighbours") as second]:
            return replace(first, is_order_guessed=False, otherwise=second.count)
    msg = (
        f"encoding is {text!r}; allowed: auto, plain, previous, neighbours, or with a number of chunks from 1 to "
        f"{_MOST_CHUNKS}, such as previous:2, or both, such as previous:2+neighbours:3"
    )
    raise InputError(msg)


def _one_encoding(text: str) -> Encoding | None:
    kind, colon, number = text.partition(":")
    known = get_args(EncodingKind)
    is_counted = number.isdecimal() and 1 <= int(number) <= _MOST_CHUNKS and kind != "plain"
    if kind not in known or (colon and not is_counted):
        return None
    return Encoding(kind, int(number) if colon else _DEFAULT_COUNTS[kind])  # type: ignore[arg-type,index]


FirstChunk = Literal["cached", "opening", "exact"]
ScoreSoftmax = Literal["context", "full_row"]
QueryScope = Literal["suffix", "question"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProphetKVConfig:
    """Settings of a `ProphetKVEngine`.

    The three settings marked *open* are questions that the paper (arXiv 2602.02579) leaves to the reader; each default
    is the paper's literal reading.

    Attributes:
        strategy: Name of the selection strategy (`prophetkv_rag.reuse.available_strategies()`).
        recompute_ratio: Fraction of the chunk tokens that is recomputed at query time, in [0, 1]; the paper's p.
            0.0 is plain reuse, 1.0 is full prefill. `None` is a twentieth of the chunks that were encoded behind others
            (see `encoding`) and a fifth, as in the paper, of those that were encoded alone, but for an exact first
            chunk; a fifth of all where that is not exact (see `first_chunk`).
        context_share: What recomputed tokens attend to, beside each other and all tokens outside the chunks: this share
            of the other chunk tokens, those just before each and then those of the highest stage-I scores, in [0, 1];
            1.0, the paper's, is all of them. Tokens outside the chunks always see everything. Read by the strategies
            that have the option `context_share`; docs/quality.md and docs/performance.md say what less costs and saves.
        first_chunk: What becomes of a prompt's first chunk, usually the nearest passage, where it was encoded behind
            more than stands before it now (a lead-in, other chunks). `"opening"`: it has a second cache, encoded behind
            the prompt's opening alone, which is computed when a prompt first has the chunk first, and exact where
            nothing else stands before it. `"exact"`: where something does, it is recomputed whole, beyond the ratio,
            and charged. `"cached"`: it is as any other. For `prophetkv` and `prophetkv_late`; docs/encodings.md says
            what it gains.
        score_softmax: *Open (a).* Softmax of stage I over the `"context"` keys only (Algorithm 1, the paper's reading),
            or over the `"full_row"`, the attention the model really pays, of which the context part is kept.
        query_scope: *Open (b).* Which tokens ask in stage I: the whole `"suffix"` after the last chunk (the paper's
            Algorithm 1 returns K/V of exactly the context and Q_s, so Q_s is everything after the context), or only
            the `"question"`, where the caller or the prompt tells which tokens that is.
        first_chunk_eligible: *Open (c).* Whether tokens of a first chunk that is exact already (it follows the very
            prefix it was encoded behind) may be selected. True is the paper's reading (T_p is over all t <= C). It
            counts where `first_chunk` is `"cached"`; else ProphetKV leaves an exact first chunk as it is.
        encoding_prefix: What every chunk is encoded behind, as a text or a tuple of token ids, which is then all there
            is; `None` for what `prompt_template` and `lead_in` say. It is part of every cache key.
        prompt_template: The application's prompt, with `{context}` (or `{context_str}`, ...) where the chunks stand: a
            text as it is, or chat messages (`[{"role": ..., "content": ...}]`). Chunks are encoded behind what stands
            before it, as they will stand in prompts. `None` for BOS and the chat template's opening of a user message.
        lead_in: Text of the same kind as the chunks, such as one of the documents; its first `lead_in_tokens` stand
            behind the prompt's opening. A chunk's cache then resembles that of a passage in the middle of such a prompt
            rather than at its start, at no cost at query time (docs/quality.md says what both gain). It leaves its
            trace in every cache, so take a text that you trust and that all readers of the collection may see.
            `None` for none, as in the papers.
        lead_in_tokens: Longest lead-in; best as long as the chunks are (Star Attention, arXiv 2411.17116, Table 4).
        encoding: Which other chunks a chunk is encoded behind, after the prefix: none (`"plain"`, as in the paper), the
            chunks before it in its document (`"previous:2"`: two of them), or its nearest neighbours in the collection
            (`"neighbours:3"`, as in FusionRAG, arXiv 2601.12904). `"previous:2+neighbours:3"` puts neighbours before
            a chunk that is a whole document. `"auto"` is `"previous:2"` where a framework's
            metadata or the caller says what the document's order is; `"previous:2"` itself takes texts that are added
            in one call for a document, too. They leave their trace in its cache, so a deleted document takes along the
            caches that bear its trace; they are computed again. See docs/encodings.md.
        index_batch_tokens: Upper bound of tokens in one index-time forward pass; bounds memory while indexing.
        namespace: Whose caches these are. Engines of different namespaces share nothing: neither hits, nor what is
            found in prompts, nor deletes, though they may share a directory (and its byte limit).
        remember: Whether answered prompts are kept, with their answers, so that one which begins as a former one (the
            next turn of a conversation, a prompt that is sent again) computes only what is new; a call's own
            `remember=` overrides it. docs/conversations.md says what is taken over.
        remember_bytes: Most bytes of RAM for that, the least recently used go first.
        max_batch: Most answers that are decoded together, in one forward a token, where several calls are made at once
            (threads, async calls, a framework's batch, `generate_batch`); further ones begin as others end, so it also
            bounds how many prompts' caches there are at a time. 1: one answer after the other.
        max_batch_tokens: Most tokens of the prompts and answers whose caches are held at a time for that; a prompt that
            has no room beside those under way waits, and one that is longer is answered by itself. 4 GiB of
            Llama-3.1-8B in bf16, 1.4 GiB of SmolLM2-135M in fp32.
        batch_prefill: Whether the stages of such prompts share forwards, too. `None`: not on a CPU, where
            what it gains is not sure (docs/performance.md); elsewhere yes.
        max_prompt_tokens: Own limit on a prompt's length, in tokens; `None` for the model's context window.

    Raises:
        ValueError: If a value is outside what is allowed.
    """

    strategy: str = "prophetkv"
    recompute_ratio: float | None = None
    context_share: float = 1.0
    first_chunk: FirstChunk = "opening"
    score_softmax: ScoreSoftmax = "context"
    query_scope: QueryScope = "suffix"
    first_chunk_eligible: bool = True
    encoding_prefix: str | tuple[int, ...] | None = None
    prompt_template: str | Sequence[Mapping[str, str]] | None = None
    lead_in: str | None = None
    lead_in_tokens: int = LEAD_IN_TOKENS
    encoding: str = "auto"
    index_batch_tokens: int = 2048
    max_batch: int = 8
    max_batch_tokens: int = BATCH_TOKENS
    batch_prefill: bool | None = None
    max_prompt_tokens: int | None = None
    remember: bool = True
    remember_bytes: int = REMEMBER_BYTES
    namespace: str = ""

    def __post_init__(self) -> None:
        if self.recompute_ratio is not None:
            check_recompute_ratio(self.recompute_ratio)
        check_context_share(self.context_share)
        check_first_chunk(self.first_chunk)
        if self.score_softmax not in get_args(ScoreSoftmax):
            msg = f"score_softmax is {self.score_softmax!r}; allowed: {', '.join(get_args(ScoreSoftmax))}"
            raise ValueError(msg)
        if self.query_scope not in get_args(QueryScope):
            msg = f"query_scope is {self.query_scope!r}; allowed: {', '.join(get_args(QueryScope))}"
            raise ValueError(msg)
        parse_encoding(self.encoding)
        if self.prompt_template is not None:
            _check_template(self.prompt_template)
        if self.lead_in_tokens < 1:
            msg = f"lead_in_tokens is {self.lead_in_tokens}; it must be at least 1 (lead_in=None is for no lead-in)"
            raise ValueError(msg)
        if self.index_batch_tokens < 1:
            msg = f"index_batch_tokens is {self.index_batch_tokens}; it must be at least 1"
            raise ValueError(msg)
        if isinstance(self.max_batch, bool) or self.max_batch < 1:
            msg = f"max_batch is {self.max_batch}; it must be at least 1 (one answer after the other)"
            raise ValueError(msg)
        if isinstance(self.max_batch_tokens, bool) or self.max_batch_tokens < 1:
            msg = f"max_batch_tokens is {self.max_batch_tokens}; it must be at least 1 (one answer after the other)"
            raise ValueError(msg)
        if isinstance(self.remember_bytes, bool) or self.remember_bytes < 0:
            msg = f"remember_bytes is {self.remember_bytes}; it must be 0 (nothing is remembered) or more bytes"
            raise ValueError(msg)
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            msg = f"max_prompt_tokens is {self.max_prompt_tokens}; it must be at least 1, or None for the model's own"
            raise ValueError(msg)


def _check_template(template: str | Sequence[Mapping[str, str]]) -> None:
    try:
        texts = [template] if isinstance(template, str) else [message["content"] for message in template]
        found = [PLACEHOLDER.search(text) for text in texts]
    except (TypeError, KeyError):
        msg = "prompt_template must be a text, or messages with 'role' and 'content'"
        raise ValueError(msg) from None
    if not any(found):
        msg = "prompt_template has no {context} placeholder; write it where your prompt has the retrieved chunks"
        raise ValueError(msg)


def check_recompute_ratio(ratio: float) -> float:
    """Return `ratio`, or raise `InputError` if it is not a number in [0, 1]."""
    if not _is_share(ratio):
        msg = f"recompute_ratio is {ratio!r}; it must be a number from 0 (plain reuse) to 1 (full prefill)"
        raise InputError(msg)
    return float(ratio)


def check_context_share(share: float) -> float:
    """Return `share`, or raise `InputError` if it is not a number in [0, 1]."""
    if not _is_share(share):
        msg = f"context_share is {share!r}; it must be a number from 0 (recomputed tokens see each other) to 1 (all)"
        raise InputError(msg)
    return float(share)


def check_first_chunk(value: str) -> str:
    """Return `value`, or raise `InputError` if it is not one of `FirstChunk`."""
    if value not in get_args(FirstChunk):
        msg = f"first_chunk is {value!r}; allowed: {', '.join(get_args(FirstChunk))}"
        raise InputError(msg)
    return value


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0
