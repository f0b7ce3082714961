"""The engine: everything from a prompt to a filled KV cache, and generation from it.

One sentence: ProphetKV is a function that builds a `past_key_values`; what follows is plain transformers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prophetkv_rag.assemble import assemble
from prophetkv_rag.attention import plain_cache
from prophetkv_rag.chunk_cache import CacheIdentity, ChunkCache
from prophetkv_rag.chunk_index import ChunkIndex, text_entry
from prophetkv_rag.config import ProphetKVConfig, check_recompute_ratio
from prophetkv_rag.encode import encode_chunks, encode_prefix
from prophetkv_rag.errors import ContextWindowError, InputError, StoreError
from prophetkv_rag.generation import GenerationResult, SamplingSettings, StreamChunk, decode, end_token_ids
from prophetkv_rag.layout import Message, PromptLayout, PromptReader
from prophetkv_rag.model import load_model, model_fingerprint, tokenizer_fingerprint
from prophetkv_rag.probe import probe_model
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.recompute import recompute
from prophetkv_rag.report import ChunkReport, ChunkStatus, ReuseReport, Timings
from prophetkv_rag.selection import QueryContext, Strategy, make_strategy
from prophetkv_rag.selection.base import token_budget
from prophetkv_rag.store.base import ChunkStore, TextEntry
from prophetkv_rag.store.memory import MemoryStore
from prophetkv_rag.tokens import Tokens

logger = logging.getLogger(__name__)

AnyPrompt = str | Sequence[Message] | Prompt


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """A filled cache, ready for `model.generate(input_ids, past_key_values=past_key_values)`.

    Attributes:
        past_key_values: A standard transformers cache with one row for each of the prompt's N tokens.
        input_ids: `[1, N]`, int64.
        logits: `[1, vocab]` of the last token, fp32.
        report: What was reused and how long it took.
    """

    past_key_values: Any
    input_ids: torch.Tensor
    logits: torch.Tensor
    report: ReuseReport


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
        self._prefix = encode_prefix(model, self.support, prefix_ids)
        self._end_tokens = end_token_ids(model, tokenizer)
        self.chunk_index = ChunkIndex()
        for key, entry in self.store.entries(self.identity.fingerprint):
            self.chunk_index.add(key, entry)
        self._reader = PromptReader(self._tokens, self.identity, self.chunk_index)

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

    # ---- index time -------------------------------------------------------------------------------------------------

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
        keys, missing = [], dict[str, tuple[list[int], TextEntry | None]]()
        entries = dict[str, TextEntry]()
        for number, chunk in enumerate(texts):
            input_ids, entry = self._chunk_ids(number, chunk)
            key = self.identity.key(input_ids)
            keys.append(key)
            if entry is not None:
                entries[key] = entry
            if key not in self.store:
                missing[key] = (input_ids, entry)
        self._compute(missing, progress)
        self.store.add_references(owner, dict.fromkeys(keys))
        for key, entry in entries.items():
            self.chunk_index.add(key, entry)
        return keys

    def remove_chunks(self, keys: Iterable[str], *, owner: str) -> list[str]:
        """Drop `owner`'s references; returns the keys of the caches that nobody refers to any more and are deleted."""
        deleted = self.store.drop_references(owner, keys)
        for key in deleted:
            self.chunk_index.remove(key)
        return deleted

    def _chunk_ids(self, number: int, chunk: str | Sequence[int]) -> tuple[list[int], TextEntry | None]:
        entry = None
        if isinstance(chunk, str):
            text = chunk.strip()
            input_ids = self._tokens.chunk(text) if text else []
            entry = text_entry(text) if text else None
        else:
            input_ids = [int(token) for token in chunk]
        if not input_ids:
            msg = f"chunk {number} is empty; leave it out"
            raise InputError(msg)
        total = len(self.identity.prefix_ids) + len(input_ids)
        if total > self.context_window:
            msg = (
                f"chunk {number} has {len(input_ids)} tokens, with the encoding prefix {total}, but the context window "
                f"is {self.context_window}; split it into smaller chunks"
            )
            raise ContextWindowError(msg)
        return input_ids, entry

    def _compute(
        self, missing: dict[str, tuple[list[int], TextEntry | None]], progress: Callable[[int, int], None] | None
    ) -> None:
        keys = list(missing)
        encoding = encode_chunks(
            self.model,
            self.support,
            self._prefix,
            [missing[key][0] for key in keys],
            batch_tokens=self.config.index_batch_tokens,
        )
        done = 0
        while True:
            with self._lock:  # released between batches, so that queries are answered while a corpus is indexed
                item = next(encoding, None)
            if item is None:
                return
            index, cache = item
            self.store.put(keys[index], cache, fingerprint=self.identity.fingerprint, entry=missing[keys[index]][1])
            done += 1
            if progress is not None:
                progress(done, len(keys))

    # ---- query time -------------------------------------------------------------------------------------------------

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
        for key, entry in self.store.new_entries(self.identity.fingerprint):
            self.chunk_index.add(key, entry)
        layout = self._reader.read(prompt, query=query)
        self._check_window(layout)
        timings = Timings(match=time.perf_counter() - started)
        if not layout.chunks or not chosen.uses_caches:
            return self._full_prefill(layout, chosen, timings, started)
        return self._reuse(layout, chosen, ratio, timings, started)

    def _check_window(self, layout: PromptLayout) -> None:
        needed = layout.num_tokens + len(layout.probe_ids)
        if needed > self.context_window:
            msg = (
                f"the prompt has {needed} tokens but the context window is {self.context_window}; retrieve fewer or "
                "smaller chunks (similarity_top_k, chunk_size) or use a model with a longer window"
            )
            raise ContextWindowError(msg)

    def _full_prefill(
        self, layout: PromptLayout, strategy: Strategy, timings: Timings, started: float
    ) -> PrefillResult:
        input_ids = layout.input_ids[None].to(self.model.device)
        running = time.perf_counter()
        with self._lock, torch.no_grad():
            output = self.model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        timings.recompute = time.perf_counter() - running
        timings.ttft = time.perf_counter() - started
        report = ReuseReport(
            strategy=strategy.name,
            recompute_ratio=1.0,
            prompt_tokens=layout.num_tokens,
            chunk_tokens=layout.num_chunk_tokens,
            reused_tokens=0,
            recomputed_tokens=layout.num_chunk_tokens,
            fresh_tokens=layout.num_tokens - layout.num_chunk_tokens,
            row_layers=layout.num_tokens * len(self.support.layers),
            chunks=[ChunkReport(chunk.key, len(chunk.input_ids), "unused") for chunk in layout.chunks],
            timings_s=timings,
        )
        return PrefillResult(output.past_key_values, input_ids, logits, report)

    def _reuse(
        self, layout: PromptLayout, strategy: Strategy, ratio: float, timings: Timings, started: float
    ) -> PrefillResult:
        device = self.model.device
        mark = time.perf_counter()
        caches, statuses = self._load(layout)
        timings.load = time.perf_counter() - mark

        with self._lock, torch.no_grad():
            mark = time.perf_counter()
            layers = assemble(
                self.support,
                caches,
                [chunk.start for chunk in layout.chunks],
                layout.num_tokens + len(layout.probe_ids),
                dtype=self.model.dtype,
                device=device,
            )
            del caches
            timings.assemble = time.perf_counter() - mark

            mark = time.perf_counter()
            context = self._query_context(layout, layers, ratio)
            selection = strategy.select(context)
            timings.score = time.perf_counter() - mark

            mark = time.perf_counter()
            wanted = ~context.is_chunk
            if context.prefix_done:
                wanted[: layout.context_start] = False
            always = wanted.nonzero()[:, 0]
            wanted[selection.positions] = True
            for layer in layers:
                layer.keys = layer.keys[:, :, : layout.num_tokens]
                layer.values = layer.values[:, :, : layout.num_tokens]
            logits, row_layers = recompute(
                self.model,
                self.support,
                layers,
                context.input_ids,
                wanted.nonzero()[:, 0],
                always=always,
                prune=selection.prune,
            )
            seconds = time.perf_counter() - mark
        num_selected = int(selection.positions.shape[0])
        if num_selected:
            timings.recompute = seconds
        else:
            timings.suffix = seconds
        timings.ttft = time.perf_counter() - started
        # A chunk token at the very end of the prompt is always computed, as its logits are needed.
        num_recomputed = num_selected + int(layout.chunks[-1].stop == layout.num_tokens)
        report = ReuseReport(
            strategy=strategy.name,
            recompute_ratio=ratio,
            prompt_tokens=layout.num_tokens,
            chunk_tokens=layout.num_chunk_tokens,
            reused_tokens=layout.num_chunk_tokens - num_recomputed,
            recomputed_tokens=num_recomputed,
            fresh_tokens=layout.num_tokens - layout.num_chunk_tokens,
            row_layers=context.row_layers + row_layers,
            chunks=[
                ChunkReport(chunk.key, len(chunk.input_ids), status)
                for chunk, status in zip(layout.chunks, statuses, strict=True)
            ],
            timings_s=timings,
        )
        cache = plain_cache([layer.keys for layer in layers], [layer.values for layer in layers])
        return PrefillResult(cache, context.input_ids[None], logits, report)

    def _query_context(self, layout: PromptLayout, layers: Sequence[Any], ratio: float) -> QueryContext:
        device = self.model.device
        eligible = layout.is_chunk.clone()
        if layout.exact_first_chunk and not self.config.first_chunk_eligible:
            eligible[layout.chunks[0].start : layout.chunks[0].stop] = False
        return QueryContext(
            model=self.model,
            support=self.support,
            layers=layers,
            layout=layout,
            input_ids=layout.input_ids.to(device),
            is_chunk=layout.is_chunk.to(device),
            eligible=eligible.to(device),
            budget=token_budget(ratio, layout.num_chunk_tokens),
            config=self.config,
        )

    def _load(self, layout: PromptLayout) -> tuple[list[ChunkCache], list[ChunkStatus]]:
        """Load the chunks' caches; what is missing or bad is encoded again, exactly as at index time, and stored."""
        found: dict[str, ChunkCache] = {}
        status: dict[str, ChunkStatus] = {}
        for chunk in layout.chunks:
            if chunk.key in status:
                continue
            cache, was_corrupt = self.store.get(
                chunk.key, fingerprint=self.identity.fingerprint, input_ids=chunk.input_ids
            )
            status[chunk.key] = "hit" if cache is not None else "corrupt" if was_corrupt else "miss"
            if cache is not None:
                found[chunk.key] = cache
        wanted = {chunk.key: chunk for chunk in layout.chunks if chunk.key not in found}
        if wanted:
            keys = list(wanted)
            with self._lock:
                encoded = list(
                    encode_chunks(
                        self.model,
                        self.support,
                        self._prefix,
                        [wanted[key].input_ids for key in keys],
                        batch_tokens=self.config.index_batch_tokens,
                    )
                )
            for index, cache in encoded:
                found[keys[index]] = cache
                try:
                    self.store.put(keys[index], cache, fingerprint=self.identity.fingerprint)
                except (StoreError, OSError) as error:
                    logger.warning("chunk cache %s could not be stored, it is used once: %s", keys[index][:12], error)
        return [found[chunk.key] for chunk in layout.chunks], [status[chunk.key] for chunk in layout.chunks]

    # ---- generation -------------------------------------------------------------------------------------------------

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
    ) -> Iterator[StreamChunk]:
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
            result.past_key_values,
            result.input_ids,
            result.logits,
            SamplingSettings(
                max_new_tokens=min(settings.max_new_tokens, room),
                stop=settings.stop,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
            ),
            end_tokens=self._end_tokens,
            to_text=self._tokens.decode,
            model_lock=self._lock,
            report=result.report,
        )

    def generate(self, prompt: AnyPrompt, **settings: Any) -> GenerationResult:
        """Answer a prompt at once; takes the arguments of `stream`."""
        last: StreamChunk | None = None
        for last in self.stream(prompt, **settings):
            pass
        assert last is not None and last.finish_reason is not None
        return GenerationResult(last.text, last.token_ids, last.finish_reason, last.report)
