"""The engine: from a prompt to a filled `past_key_values`, and generation from it; the rest is plain transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from prophetkv_rag.chunks import open_library
from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.conversations import ConversationTier, SavesConversations
from prophetkv_rag.generation import (
    AnswersPrompts,
    Grammar,
    GrammarCompiler,
    InterruptibleLock,
    SamplingSettings,
    StreamChunk,
    Turns,
    end_token_ids,
    stream_answer,
)
from prophetkv_rag.model import ModelState, RowsLayer, load_model, model_fingerprint, model_lock, own_state, probe_model
from prophetkv_rag.profile import Profile, with_profile
from prophetkv_rag.prompt import AnyPrompt, ChunkIndex, PromptLayout, PromptReader, Tokens
from prophetkv_rag.reuse import Prefiller, PrefillResult, QueryContext, Strategy, make_strategy
from prophetkv_rag.store import ChunkStore, MemoryStore
from prophetkv_rag.waiting import advise


class ProphetKVEngine(AnswersPrompts, SavesConversations):
    """Caches chunks at index time; reuses and partly recomputes them at query time.

    Engines may be used from many threads, several on one model too: it runs step by step, for one caller at a time, or
    for those of one engine together where they decode.
    Whoever calls `engine.model` directly meanwhile holds `engine.model_lock`. The caller's settings of torch (autocast,
    default device and dtype, inference mode, gradients) do not reach what is computed, and a model that `torch.compile`
    has compiled runs uncompiled here. Weights and adapters must stay as they were when the engine was made: a call
    after a change raises `ModelChangedError`. `conversations` holds what is remembered of former prompts.
    """

    @own_state()
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        config: ProphetKVConfig | None = None,
        store: ChunkStore | None = None,
        profile: str | Path | Profile | None = None,
    ) -> None:
        """Make an engine from what is loaded already.

        Args:
            model: A transformers causal language model. It is probed, set to evaluation mode, and otherwise left alone.
            tokenizer: Its tokenizer; `None` if prompts and chunks are given as token ids only.
            config: Settings.
            store: Keeps the chunk caches; in RAM by default.
            profile: What `prophetkv-rag calibrate` wrote for this model; overrides the config's strategy and ratio.

        Raises:
            UnsupportedModelError: If the model's caches cannot be re-positioned exactly, or it is not all here.
            InputError: If the profile cannot be read or was made for other weights, or the strategy is unknown.
        """
        self.support = probe_model(model)
        self.model, self.tokenizer = model, tokenizer
        self.model_lock = model_lock(model)
        with self.model_lock:
            fingerprint, state = model_fingerprint(model), ModelState(model)
        self.config = with_profile(config or ProphetKVConfig(), profile, model_fingerprint=fingerprint)
        make_strategy(self.config.strategy)
        if model.device.type == "cpu":
            advise(torch.get_num_threads())
        self.store = store if store is not None else MemoryStore()
        window = self.support.context_window
        self.context_window = min(self.config.max_prompt_tokens or window, window)
        self.tokens = Tokens(tokenizer)
        self.library = open_library(
            model,
            self.support,
            self.tokens,
            self.store,
            self.config,
            fingerprint=fingerprint,
            state=state,
            context_window=self.context_window,
            model_lock=self.model_lock,
        )
        self.identity = self.library.identity
        self.end_tokens = end_token_ids(model, tokenizer)
        self._grammars = GrammarCompiler(tokenizer, self.end_tokens)
        self._reader = PromptReader(self.tokens, self.identity, self.chunk_index)
        self.conversations = ConversationTier(self.config.remember_bytes, self.store.known, self.chunk_index)
        shares = model.device.type != "cpu" if self.config.batch_prefill is None else self.config.batch_prefill
        most, tokens = self.config.max_batch, self.config.max_batch_tokens
        check = self.library.state.check_adapters
        self.turns = Turns(self.model_lock, model, check, most=most, most_tokens=tokens, shares_passes=shares)
        self._prefiller = Prefiller.over(self.library, self.config, self._reader, self.conversations)

    @property
    def max_concurrent(self) -> int:
        """Answers that the model works on at a time."""
        return self.config.max_batch

    def key_of(self, text: str) -> str:
        """Return the key of the chunk with this text, whether or not it is known."""
        return self.library.key_of(text)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        config: ProphetKVConfig | None = None,
        store: ChunkStore | None = None,
        profile: str | Path | Profile | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> ProphetKVEngine:
        """Load a model and its tokenizer and make an engine; see `model.load_model` for names and errors."""
        model, tokenizer = load_model(name_or_path, dtype=dtype, device=device)
        return cls(model, tokenizer, config=config, store=store, profile=profile)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProphetKVEngine:
        """Frameworks copy their LLM objects; the model behind them is shared."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, before the weights are."""
        msg = "a ProphetKVEngine cannot be pickled: it holds a model; make one in each process"
        raise TypeError(msg)

    @property
    def chunk_index(self) -> ChunkIndex:
        """Finds the texts of stored chunks in prompts."""
        return self.library.chunk_index

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be chat messages."""
        return self.tokens.has_chat_template

    def add_chunks(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        owner: str = "engine",
        behind: Sequence[Sequence[str]] | None = None,
        refresh: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Compute and store the KV caches of chunks, as far as they are not stored yet.

        A store that fails (disk full, read-only directory) does not fail this call: that is logged once, prompts
        compute the chunks, and adding them again stores what is missing (`store.stats().failed_writes`).

        Args:
            texts: Chunk texts (surrounding white space is not part of a chunk) or lists of token ids.
            owner: Who refers to them; a cache lives as long as somebody does.
            behind: For each chunk, the texts of the chunks it is encoded behind, the last one right before it; only
                those that the store knows or that are among `texts` count, and only as many as
                `ProphetKVConfig.encoding` says. A chunk that is stored without any is encoded anew. By default the
                texts of one call are one document, in order (`"previous"`), or stand alone (`"neighbours"`).
            refresh: Also encode anew what is stored behind others than most of those.
            progress: Called with (chunks computed so far, chunks to compute).

        Returns:
            One cache key per chunk, in order.

        Raises:
            InputError: If a chunk is empty. Nothing is stored then.
            ContextWindowError: If a chunk is longer than the model's context window. Nothing is stored then.
            ModelChangedError: If chunks must be computed and the model is not what it was.
        """
        return self.library.add(texts, owner=owner, behind=behind, refresh=refresh, progress=progress)

    def remove_chunks(self, keys: Iterable[str], *, owner: str = "engine") -> list[str]:
        """Drop `owner`'s references; returns the keys of the caches that nobody refers to any more and are deleted.

        Conversations are forgotten from those chunks on.
        """
        deleted = self.library.remove(keys, owner=owner)
        self.conversations.drop(deleted)
        return deleted

    def prefill(
        self,
        prompt: AnyPrompt,
        *,
        strategy: str | Strategy | None = None,
        recompute_ratio: float | None = None,
        query: str | None = None,
        remember: bool = False,
        tenant: str = "",
    ) -> PrefillResult:
        """Fill a KV cache for a prompt, reusing the caches of the chunks found in it.

        Args:
            prompt: Text as it is, chat messages, or a `Prompt`.
            strategy: Overrides the configured strategy for this call.
            recompute_ratio: Overrides the configured ratio for this call.
            query: The question, where the caller knows it apart from the prompt.
            remember: Whether to go on from a former prompt, as `stream` does by itself, and to keep a copy of this one.
            tenant: As in `stream`.

        Returns:
            The cache, the prompt's token ids, the last token's logits and the report.

        Raises:
            InputError: For an empty prompt, an unknown strategy or a ratio outside [0, 1].
            ContextWindowError: If the prompt is longer than the context window.
            ModelChangedError: If the model is not what it was.
        """
        return self._prefiller.run(prompt, strategy, recompute_ratio, query, remember=remember, tenant=tenant)

    @own_state()
    def query_context(self, prompt: AnyPrompt, layers: Sequence[RowsLayer]) -> QueryContext:
        """Return what a strategy sees of a prompt (as in `prefill`), to measure or develop strategies.

        It sees caches of the caller's own: `layers`, one per decoder layer, with a row for each of the prompt's tokens;
        stage I writes into them.
        """
        return self._prefiller.query_context(self.read(prompt), layers)

    @own_state()
    def read(self, prompt: AnyPrompt, *, query: str | None = None) -> PromptLayout:
        """Return a prompt's token ids and where its known chunks lie; takes what `prefill` takes."""
        return self._reader.read(prompt, query=query)

    def stream(
        self,
        prompt: AnyPrompt,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        strategy: str | Strategy | None = None,
        recompute_ratio: float | None = None,
        query: str | None = None,
        grammar: Grammar | None = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        remember: bool | None = None,
        tenant: str = "",
    ) -> Generator[StreamChunk, None, None]:
        """Answer a prompt piece by piece; closing the iterator stops generation at once.

        Args:
            prompt: Text as it is, chat messages, or a `Prompt`.
            max_new_tokens: Longest answer, in tokens; also bounded by the context window.
            stop: Strings that end the answer (they are not part of it).
            temperature: 0 for greedy.
            top_p: Nucleus sampling.
            seed: Makes sampling repeatable.
            strategy: As in `prefill`.
            recompute_ratio: As in `prefill`.
            query: As in `prefill`.
            grammar: What the answer must look like, such as `Grammar.json_schema(schema)`; only a whole one ends with
                the reason `"stop"`. Needs the extra `structured`.
            cancel: Setting it, from any thread, ends the answer with the reason `"cancelled"` before the model runs
                again; before the prefill that is one empty piece, with a report of zeros.
            deadline_s: Seconds from the first `next`; then the answer ends as it is, with the reason `"deadline"`.
            remember: Overrides the configured `remember` for this call.
            tenant: Whose conversation it is: prompts of other tenants neither find its rows nor are found.

        Yields:
            Pieces of the answer; the last one has a finish reason.

        Raises:
            InputError: As in `prefill`, for settings that make no sense and grammars that cannot be kept; raised at the
                first `next`.
            DeadlineError: If the deadline passes before the prefill, which is not broken off once it runs.
        """
        settings = SamplingSettings(
            max_new_tokens=max_new_tokens, stop=stop, temperature=temperature, top_p=top_p, seed=seed
        )
        lock = InterruptibleLock(self.model_lock, cancel, deadline_s, self.turns, max_new_tokens)
        constraint = None if grammar is None else self._grammars.start(grammar)
        kept = self.config.remember if remember is None else remember
        prefill = partial(self._prefiller.run, prompt, strategy, recompute_ratio, query, remember=kept, tenant=tenant)
        yield from stream_answer(
            partial(prefill, answer_lock=lock),
            self.model,
            settings,
            context_window=self.context_window,
            end_tokens=self.end_tokens,
            to_text=self.tokens.decode,
            model_lock=lock,
            check=self.library.state.check_adapters,
            constraint=constraint,
            keep=self.conversations.keep,
            layers=self.support.layers,
        )
