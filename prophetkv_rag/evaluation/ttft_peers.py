"""What else gets to the first token sooner: transformers' prefix reuse, when the chunks' order repeats and when not.

A prefix cache (also vLLM's or llama.cpp's) reuses the rows of a prompt's beginning as far as it is the same, token by
token. In RAG that holds while the same chunks come in the same order, and ends at the first one that differs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers.cache_utils import DynamicCache

from prophetkv_rag.attention import complete_cache
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.prefill import PrefillResult
from prophetkv_rag.prompt import Prompt

DECODE_STEPS = 16


class PrefixReuse:
    """Continues from the cache of an earlier prompt with another question, as far as the prompts agree."""

    name: ClassVar[str] = "prefix cache, same order"

    def __init__(self, engine: ProphetKVEngine, prompt: Prompt) -> None:
        """Prefill the earlier prompt."""
        self.engine = engine
        self.input_ids = engine.read(prompt).input_ids[None].to(engine.model.device)
        earlier = engine.read(self.earlier(prompt)).input_ids.tolist()
        self.num_shared = 0
        for ours, theirs in zip(self.input_ids[0].tolist()[:-1], earlier, strict=False):
            if ours != theirs:
                break
            self.num_shared += 1
        self.cache = DynamicCache()
        with engine.model_lock, torch.no_grad():
            engine.model(
                input_ids=torch.tensor([earlier], device=engine.model.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )

    def earlier(self, prompt: Prompt) -> Prompt:
        """Return the earlier prompt: the same chunks, another question."""
        return Prompt(prompt.prefix, prompt.chunks, f"\nWhat else is said?\n{prompt.suffix}")

    @torch.no_grad()
    def seconds(self) -> float:
        """Return the time to the first token's logits."""
        for layer in self.cache.layers:  # views, as a serving engine's paged cache would drop rows at no cost
            layer.keys, layer.values = layer.keys[:, :, : self.num_shared], layer.values[:, :, : self.num_shared]
        with self.engine.model_lock:
            started = time.perf_counter()
            self.engine.model(
                input_ids=self.input_ids[:, self.num_shared :],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return time.perf_counter() - started


class PrefixReuseOtherOrder(PrefixReuse):
    """The same chunks, but the best one was another."""

    name: ClassVar[str] = "prefix cache, other order"

    def earlier(self, prompt: Prompt) -> Prompt:
        """Return the earlier prompt: the chunks in the opposite order."""
        return Prompt(prompt.prefix, list(reversed(prompt.chunks)), prompt.suffix)


PEERS: Sequence[type[PrefixReuse]] = (PrefixReuse, PrefixReuseOtherOrder)


@torch.no_grad()
def decode_seconds(engine: ProphetKVEngine, result: PrefillResult) -> float:
    """Return the time of `DECODE_STEPS` greedy steps from a prefill's cache, end tokens or not."""
    cache: Any = complete_cache(result.past_key_values)
    step = result.logits.argmax(-1, keepdim=True)
    started = time.perf_counter()
    for _ in range(DECODE_STEPS):
        with engine.model_lock:
            logits = engine.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        step = logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - started
