"""Opening the library of a model: what its caches depend on, and the prefix that every chunk is encoded behind."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from prophetkv_rag.chunks.encode import encode_prefix
from prophetkv_rag.chunks.library import ChunkLibrary
from prophetkv_rag.config import ProphetKVConfig, parse_encoding
from prophetkv_rag.model import ModelState, ModelSupport, TransformersRunner, tokenizer_fingerprint
from prophetkv_rag.prompt import Tokens
from prophetkv_rag.store import CacheIdentity, ChunkStore


def open_library(
    model: Any,
    support: ModelSupport,
    tokens: Tokens,
    store: ChunkStore,
    config: ProphetKVConfig,
    *,
    fingerprint: str,
    state: ModelState,
    context_window: int,
    model_lock: AbstractContextManager[Any],
) -> ChunkLibrary:
    """Open a model's chunks in a store.

    Args:
        model: The language model.
        support: The probe's findings.
        tokens: Its tokenizer.
        store: Keeps the caches.
        config: Says what chunks are encoded behind, and whose they are.
        fingerprint: Of the model's weights.
        state: What the model must still be when chunks are encoded.
        context_window: Most positions of a prompt.
        model_lock: Held while the model runs.
    """
    opening_ids = tokens.encoding_prefix(replace(config, lead_in=None), max_lead_in_tokens=0)
    prefix_ids = tokens.encoding_prefix(
        config,
        # A lead-in must leave most of a short window to the chunk.
        max_lead_in_tokens=min(config.lead_in_tokens, context_window // 8),
    )
    encoding = parse_encoding(config.encoding)
    with model_lock:
        prefix = encode_prefix(TransformersRunner(model), support, prefix_ids)
    return ChunkLibrary(
        model,
        support,
        tokens,
        store,
        CacheIdentity(
            fingerprint,
            tokenizer_fingerprint(tokens.tokenizer),
            prefix_ids,
            support.dtype,
            config.namespace,
            "" if encoding.kind == "plain" else str(encoding),
        ),
        prefix,
        opening_length=len(opening_ids),
        encoding=encoding,
        state=state,
        context_window=context_window,
        batch_tokens=config.index_batch_tokens,
        model_lock=model_lock,
    )
