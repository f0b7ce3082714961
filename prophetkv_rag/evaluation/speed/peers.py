"""What else gets to the first token sooner: transformers' prefix reuse, when the chunks' order repeats and when not.

A prefix cache (also vLLM's or llama.cpp's) reuses the rows of a prompt's beginning as far as it is the same, token by
token. In RAG that holds while the same chunks come in the same order, and ends at the first one that differs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicCache

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.model import cache_argument, complete_cache
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.reuse import PrefillResult

DECODE_STEPS = 16


class Peer(Protocol):
    """Another way to the first token of one prompt.

    Attributes:
        name: Names its row in the tables.
        first_token: The most likely next token, as the last call of `seconds` found it; `None` before.
    """

    name: str
    first_token: int | None

    def seconds(self) -> float:
        """Run it once; return the time to the first token."""
        ...


def other_question(prompt: Prompt) -> Prompt:
    """Return an earlier prompt with the same chunks in the same order and another question."""
    return Prompt(prompt.prefix, prompt.chunks, f"\nWhat else is said?\n{prompt.suffix}")


def other_order(prompt: Prompt) -> Prompt:
    """Return an earlier prompt with the chunks in the opposite order: the best one was another."""
    return Prompt(prompt.prefix, list(reversed(prompt.chunks)), prompt.suffix)


def has_other_order(prompt: Prompt) -> bool:
    """Whether the opposite order is another one: not with a single chunk."""
    return list(prompt.chunks) != list(reversed(prompt.chunks))


def num_shared(ours: Sequence[int], earlier: Sequence[int]) -> int:
    """Return how many tokens two prompts begin with alike; ours keeps at least one to run."""
    pairs = zip(ours[:-1], earlier, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(ours) - 1, len(earlier)))


class PrefixReuse:
    """Continues from the cache of an earlier prompt with another question, as far as the prompts agree."""

    def __init__(self, engine: ProphetKVEngine, prompt: Prompt) -> None:
        """Prefill the earlier prompt."""
        self.name = "prefix cache, same order"
        self.first_token: int | None = None
        self.engine = engine
        self.input_ids = engine.read(prompt).input_ids[None].to(engine.model.device)
        earlier = engine.read(self.earlier(prompt)).input_ids.tolist()
        self.num_shared = num_shared(self.input_ids[0].tolist(), earlier)
        self.cache = DynamicCache()
        with engine.model_lock, torch.no_grad():
            engine.model(
                input_ids=torch.tensor([earlier], device=engine.model.device),
                **cache_argument(engine.model, self.cache),
                use_cache=True,
                logits_to_keep=1,
            )

    def earlier(self, prompt: Prompt) -> Prompt:
        """Return the earlier prompt: the same chunks, another question."""
        return other_question(prompt)

    @torch.no_grad()
    def seconds(self) -> float:
        """Return the time to the first token's logits."""
        for layer in self.cache.layers:  # views, as a serving engine's paged cache would drop rows at no cost
            layer.keys, layer.values = layer.keys[:, :, : self.num_shared], layer.values[:, :, : self.num_shared]
        with self.engine.model_lock:
            started = time.perf_counter()
            output = self.engine.model(
                input_ids=self.input_ids[:, self.num_shared :],
                **cache_argument(self.engine.model, self.cache),
                use_cache=True,
                logits_to_keep=1,
            )
            self.first_token = int(output.logits[0, -1].argmax())
            return time.perf_counter() - started


class PrefixReuseOtherOrder(PrefixReuse):
    """The same chunks, but the best one was another."""

    def __init__(self, engine: ProphetKVEngine, prompt: Prompt) -> None:
        """Prefill the earlier prompt."""
        super().__init__(engine, prompt)
        self.name = "prefix cache, other order"

    def earlier(self, prompt: Prompt) -> Prompt:
        """Return the earlier prompt: the chunks in the opposite order."""
        return other_order(prompt)


def transformers_peers(engine: ProphetKVEngine, prompt: Prompt) -> list[Peer]:
    """Return what transformers' own prefix reuse does on this prompt."""
    peers: list[Peer] = [PrefixReuse(engine, prompt)]
    if has_other_order(prompt):
        peers.append(PrefixReuseOtherOrder(engine, prompt))
    return peers


@torch.no_grad()
def decode_seconds(engine: ProphetKVEngine, result: PrefillResult) -> float:
    """Return the time of `DECODE_STEPS` greedy steps from a prefill's cache, end tokens or not."""
    cache: Any = complete_cache(result.past_key_values)
    argument = cache_argument(engine.model, cache)
    step = result.logits.argmax(-1, keepdim=True)
    started = time.perf_counter()
    for _ in range(DECODE_STEPS):
        with engine.model_lock:
            logits = engine.model(input_ids=step, **argument, use_cache=True, logits_to_keep=1).logits
        step = logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - started
