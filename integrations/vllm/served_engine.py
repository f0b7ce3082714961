"""What `index` and `serve --engine vllm` work with: vLLM's asynchronous engine, as we use an engine of ours.

Prompts are read by our own reader, so that they are laid out exactly as without vLLM; vLLM gets token ids.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from vllm import SamplingParams

from prophetkv_rag.config import check_recompute_ratio
from prophetkv_rag.errors import DeadlineError, InputError
from prophetkv_rag.generation import FinishReason, Grammar, StreamChunk
from prophetkv_rag.integrations.vllm.identity import load_tokenizer, open_identity
from prophetkv_rag.integrations.vllm.reports import report_of
from prophetkv_rag.integrations.vllm.running import RunningVLLM
from prophetkv_rag.integrations.vllm.sampling import Sampling
from prophetkv_rag.integrations.vllm.served_chunks import ServedChunks
from prophetkv_rag.integrations.vllm.settings import NAME, ConnectorSettings
from prophetkv_rag.integrations.vllm.tenants import TenantSalts
from prophetkv_rag.prompt import AnyPrompt, ChunkIndex, PromptLayout, PromptReader, Tokens

_RATIOS: dict[str | None, float | None] = {None: None, "prophetkv": None, "full_reuse": 0.0}


class VLLMEngine:
    """Chunks and answers, by vLLM.

    Args:
        model: Path or hub name.
        settings: Of the connector.
        engine_args: Keywords of vLLM's `AsyncEngineArgs`.

    Raises:
        InputError: If vLLM takes no such keyword, or cannot be set so.
        UnsupportedModelError: For a model whose caches cannot be re-positioned exactly.
        ProphetKVError: If vLLM does not start; its log says why.
    """

    max_concurrent = 64
    """Requests that the server hands over at once; vLLM batches and queues them."""

    def __init__(self, model: str, settings: ConnectorSettings, engine_args: Mapping[str, Any]) -> None:
        self.tenant_salts = TenantSalts()
        self._vllm = RunningVLLM(model, settings, engine_args)
        try:
            self._open(model, settings)
        except BaseException:
            self._vllm.close()
            raise

    def _open(self, model: str, settings: ConnectorSettings) -> None:
        config = self._vllm.config
        self.config = settings.engine_config()
        self.identity = open_identity(config, settings)
        self.tokens = Tokens(load_tokenizer(config.model_config))
        self.tokenizer = self.tokens.tokenizer
        self.store = settings.open_store(ram_bytes=0)
        self.context_window = int(config.model_config.max_model_len)
        self.library = ServedChunks(
            Path(model).name,
            self.tokens,
            self.store,
            self.identity,
            settings.placed,
            config.model_config,
            most_tokens=min(self.context_window, config.scheduler_config.max_num_batched_tokens)
            - len(self.identity.prefix_ids),
            register=self._register,
        )
        self._sampling = Sampling(self.tokenizer, config.structured_outputs_config.backend)
        self._reader = PromptReader(self.tokens, self.identity, self.chunk_index)

    @property
    def chunk_index(self) -> ChunkIndex:
        """Finds the texts of stored chunks in prompts."""
        return self.library.chunk_index

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be chat messages."""
        return self.tokens.has_chat_template

    def key_of(self, text: str) -> str:
        """Return the key of the chunk with this text, whether or not it is known."""
        return self.library.key_of(text)

    def add_chunks(
        self,
        texts: Sequence[str],
        *,
        owner: str = "engine",
        behind: Sequence[Sequence[str]] | None = None,
        refresh: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Have vLLM's workers encode and store what is missing; see `ProphetKVEngine.add_chunks`."""
        return self.library.add(texts, owner=owner, behind=behind, refresh=refresh, progress=progress)

    def remove_chunks(self, keys: Iterable[str], *, owner: str = "engine") -> list[str]:
        """See `ProphetKVEngine.remove_chunks`."""
        return self.library.remove(keys, owner=owner)

    def _register(self, said: Mapping[str, Any]) -> Mapping[str, Any]:
        """Send chunks in a request of their own, and return what it was answered."""
        sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": {NAME: said}})
        answered: Mapping[str, Any] = {}
        for output in self._vllm.outputs({"prompt_token_ids": [0]}, sampling):
            answered = (output.kv_transfer_params or {}).get(NAME, answered)
        return answered

    def read(self, prompt: AnyPrompt, *, query: str | None = None) -> PromptLayout:
        """Return a prompt's token ids and where its known chunks lie."""
        self.library.refresh()
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
        strategy: str | None = None,
        recompute_ratio: float | None = None,
        query: str | None = None,
        grammar: Grammar | None = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        tenant: str = "",
        remember: bool | None = None,
    ) -> Iterator[StreamChunk]:
        """Answer a prompt piece by piece; see `ProphetKVEngine.stream`.

        Former prompts of its tenant that it begins with are in vLLM's prefix cache. Without `remember` it takes nothing
        from there, and leaves nothing that is found again.

        Raises:
            InputError: For an empty prompt, a strategy that vLLM does not run, a ratio outside [0, 1], or a grammar
                that cannot be kept.
            DeadlineError: If the deadline passes before the first token.
        """
        if strategy not in (*_RATIOS, "full_prefill"):
            msg = f"strategy is {strategy!r}; with vLLM: prophetkv, full_reuse, full_prefill"
            raise InputError(msg)
        ends_at = None if deadline_s is None else time.monotonic() + deadline_s
        layout = self.read(prompt, query=query)
        layout.check_fits(self.context_window, is_reuse=bool(layout.chunks), is_answered=True)
        ours: dict[str, Any] = {"enabled": strategy != "full_prefill"}
        if strategy == "full_reuse":
            ours["first_chunk"] = "cached"
        ratio = recompute_ratio if _RATIOS.get(strategy) is None else _RATIOS[strategy]
        if ratio is not None:
            ours["recompute_ratio"] = check_recompute_ratio(ratio)
        if layout.probe_ids:
            ours["question_ids"] = list(layout.probe_ids)
        sampling = self._sampling.of(
            ours,
            max_tokens=min(max_new_tokens, self.context_window - layout.num_tokens),
            stop=stop,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            grammar=grammar,
        )
        text, token_ids, said, num_cached = "", (), None, 0
        started, first_at = time.monotonic(), None
        salt = self.tenant_salts.once() if remember is False else self.tenant_salts.salt(tenant)
        prompt_ids = {"prompt_token_ids": layout.input_ids.tolist(), "cache_salt": salt}
        for output in self._vllm.outputs(prompt_ids, sampling, cancel, ends_at):
            if isinstance(output, str):
                if output == "deadline" and not token_ids:
                    msg = "the deadline passed before the prompt was prefilled"
                    raise DeadlineError(msg)
                delta, reason = "", output
            else:
                first_at = first_at or time.monotonic()
                answer, said = output.outputs[0], (output.kv_transfer_params or {}).get(NAME)
                delta, reason = answer.text, answer.finish_reason
                if reason is not None:  # before, rows of our own count, too, and nothing says so
                    num_cached = output.num_cached_tokens or 0
                token_ids += tuple(answer.token_ids)
            text += delta
            report = report_of(layout, said, ttft_s=(first_at or started) - started, num_cached=num_cached)
            yield StreamChunk(delta, text, token_ids, None if reason is None else _REASONS[reason], report)
            if reason is not None:
                return

    def watch(self, ended: Callable[[], None]) -> None:
        """See `RunningVLLM.watch`."""
        self._vllm.watch(ended)

    @property
    def has_died(self) -> bool:
        """Whether `watch` has seen that."""
        return self._vllm.has_died

    def more_metrics(self) -> bytes:
        """Return vLLM's own metrics, as Prometheus reads them."""
        return bytes(generate_latest(REGISTRY))

    def close(self) -> None:
        """Stop vLLM and close the store."""
        self._vllm.close()
        self.store.close()


_REASONS: dict[str, FinishReason] = {
    "abort": "cancelled",
    "cancelled": "cancelled",
    "deadline": "deadline",
    "length": "length",
    "repetition": "stop",
    "stop": "stop",
}
