"""The engine: everything from a prompt to a filled KV cache, and generation from it.

One sentence: ProphetKV is a function that builds a `past_key_values`; what follows is plain transformers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from prophetkv_rag.attention import complete_cache
from prophetkv_rag.chunk_cache import CacheIdentity
from prophetkv_rag.chunk_index import ChunkIndex
from prophetkv_rag.config import ProphetKVConfig, check_recompute_ratio
from prophetkv_rag.encode import encode_prefix
from prophetkv_rag.errors import ContextWindowError, InputError
from prophetkv_rag.generation import GenerationResult, SamplingSettings, StreamChunk, decode, end_token_ids
from prophetkv_rag.layout import Message, PromptLayout, PromptReader
from prophetkv_rag.library import ChunkLibrary
from prophetkv_rag.model import load_model, model_fingerprint, tokenizer_fingerprint
from prophetkv_rag.prefill import Prefiller, PrefillResult
from prophetkv_rag.probe import probe_model
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.report import Timings
from prophetkv_rag.selection import Strategy, make_strategy
from prophetkv_rag.store.base import ChunkStore
from prophetkv_rag.store.memory import MemoryStore
from prophetkv_rag.tokens import Tokens

AnyPrompt = str | Sequence[Message] | Prompt


class ProphetKVEngine:
    """Caches chunks at index time; reuses and partly recomputes them at query time.

    One engine may be used from many threads: the model runs for one caller at a time, step by step.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        config: ProphetKVConfig | None = None,
        store: ChunkStore | None = None,
    ) -> None:
        """Make an engine from what is loaded already.

        Args:
            model: A transformers causal language model. It is probed, set to evaluation mode, and otherwise left alone.
            tokenizer: Its tokenizer; `None` if prompts and chunks are given as token ids only.
            config: Settings; the paper's by default.
            store: Keeps the chunk caches; in RAM by default.

        Raises:
            UnsupportedModelError: If the model's caches cannot be re-positioned exactly.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = config or ProphetKVConfig()
        make_strategy(self.config.strategy)
        self.store = store if store is not None else MemoryStore()
        self._lock = threading.RLock()
        self.support = probe_model(model)
        limit = self.config.max_prompt_tokens or self.support.context_window
        self.context_window = min(limit, self.support.context_window)
        self._tokens = Tokens(tokenizer)
        prefix_ids = self._encoding_prefix_ids()
        self.identity = CacheIdentity(
            model=model_fingerprint(model),
            tokenizer=tokenizer_fingerprint(tokenizer),
            prefix_ids=prefix_ids,
            dtype=self.support.dtype,
        )
        self.library = ChunkLibrary(
            model,
            self.support,
            self._tokens,
            self.store,
            self.identity,
            encode_prefix(model, self.support, prefix_ids),
            context_window=self.context_window,
            batch_tokens=self.config.index_batch_tokens,
            model_lock=self._lock,
        )
        self.end_tokens = end_token_ids(model, tokenizer)
        self._reader = PromptReader(self._tokens, self.identity, self.chunk_index)
        self._prefiller = Prefiller(model, self.support, self.config, self.library, self._lock)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        config: ProphetKVConfig | None = None,
        store: ChunkStore | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> ProphetKVEngine:
        """Load a model and its tokenizer and make an engine; see `model.load_model` for what may be named.

        Raises:
            UnknownModelError: If nothing can be loaded under that name.
            UnsupportedModelError: If the model's caches cannot be re-positioned exactly.
        """
        model, tokenizer = load_model(name_or_path, dtype=dtype, device=device)
        return cls(model, tokenizer, config=config, store=store)

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
        return self._tokens.has_chat_template

    def _encoding_prefix_ids(self) -> tuple[int, ...]:
        prefix = self.config.encoding_prefix
        if prefix is None:
            return self._tokens.default_encoding_prefix()
        if isinstance(prefix, str):
            return tuple(self._tokens.fresh(prefix, first=True))
        return tuple(prefix)

    def add_chunks(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        owner: str = "engine",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Compute and store the KV caches of chunks, as far as they are not stored yet.

        Args:
            texts: Chunk texts (surrounding white space is not part of a chunk) or lists of token ids.
            owner: Who refers to them; a cache lives as long as somebody does.
            progress: Called with (chunks computed so far, chunks to compute).

        Returns:
            One cache key per chunk, in order.

        Raises:
            InputError: If a chunk is empty. Nothing is stored then.
            ContextWindowError: If a chunk is longer than the model's context window. Nothing is stored then.
            StoreError: If the store cannot be written.
        """
        if isinstance(texts, str):
            msg = "add_chunks got one string; give a list of chunks"
            raise InputError(msg)
        return self.library.add(texts, owner=owner, progress=progress)

    def remove_chunks(self, keys: Iterable[str], *, owner: str) -> list[str]:
        """Drop `owner`'s references; returns the keys of the caches that nobody refers to any more and are deleted."""
        return self.library.remove(keys, owner=owner)

    def prefill(
        self,
        prompt: AnyPrompt,
        *,
        strategy: str | Strategy | None = None,
        recompute_ratio: float | None = None,
        query: str | None = None,
    ) -> PrefillResult:
        """Fill a KV cache for a prompt, reusing the caches of the chunks found in it.

        Args:
            prompt: Text as it is, chat messages, or a `Prompt`.
            strategy: Overrides the configured strategy for this call.
            recompute_ratio: Overrides the configured ratio for this call.
            query: The question, where the caller knows it apart from the prompt.

        Returns:
            The cache, the prompt's token ids, the last token's logits and the report.

        Raises:
            InputError: For an empty prompt, an unknown strategy or a ratio outside [0, 1].
            ContextWindowError: If the prompt is longer than the context window.
        """
        started = time.perf_counter()
        chosen = strategy if isinstance(strategy, Strategy) else make_strategy(strategy or self.config.strategy)
        ratio = self.config.recompute_ratio if recompute_ratio is None else recompute_ratio
        try:
            ratio = check_recompute_ratio(ratio)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.library.refresh()
        layout = self._reader.read(prompt, query=query)
        self._check_window(layout)
        timings = Timings(match=time.perf_counter() - started)
        if not layout.chunks or not chosen.uses_caches:
            return self._prefiller.full(layout, chosen, timings, started)
        return self._prefiller.reuse(layout, chosen, ratio, timings, started)

    def _check_window(self, layout: PromptLayout) -> None:
        needed = layout.num_tokens + len(layout.probe_ids)
        if needed > self.context_window:
            msg = (
                f"the prompt has {needed} tokens but the context window is {self.context_window}; retrieve fewer or "
                "smaller chunks (similarity_top_k, chunk_size) or use a model with a longer window"
            )
            raise ContextWindowError(msg)

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

        Yields:
            Pieces of the answer; the last one has a finish reason.

        Raises:
            InputError: As in `prefill`, and for settings that make no sense; raised at the first `next`.
        """
        settings = SamplingSettings(
            max_new_tokens=max_new_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        result = self.prefill(prompt, strategy=strategy, recompute_ratio=recompute_ratio, query=query)
        room = self.context_window - result.report.prompt_tokens
        if room < 1:
            msg = (
                f"the prompt fills the context window of {self.context_window} tokens, so no answer fits; retrieve "
                "fewer or smaller chunks"
            )
            raise ContextWindowError(msg)
        yield from decode(
            self.model,
            complete_cache(result.past_key_values),
            result.input_ids,
            result.logits,
            SamplingSettings(
                max_new_tokens=min(settings.max_new_tokens, room),
                stop=settings.stop,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
            ),
            end_tokens=self.end_tokens,
            to_text=self._tokens.decode,
            model_lock=self._lock,
            report=result.report,
        )

    def generate(self, prompt: AnyPrompt, **settings: Any) -> GenerationResult:
        """Answer a prompt at once; takes the arguments of `stream`."""
        *_, last = self.stream(prompt, **settings)
        assert last.finish_reason is not None
        return GenerationResult(last.text, last.token_ids, last.finish_reason, last.report)
