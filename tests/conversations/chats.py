"""Conversations on tiny models, turn by turn, and full prefill to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from prophetkv_rag import GenerationResult, ProphetKVEngine
from prophetkv_rag.model import cache_argument
from tests.tiny import CORPUS

CHUNKS = list(CORPUS[:3])
QUESTIONS = [
    "How many planes shall be produced?",
    "And who watches the quick brown fox?",
    "What is the context for, and when is it given?",
    "Does the harbour ever close?",
    "What was learned on Monday?",
    "Say the first answer again.",
    "Which of the passages names a river?",
    "How many tanks are there?",
    "Who is lazy here?",
    "Thank you; anything else?",
]


def with_context(question: str, chunks: Sequence[str] = CHUNKS) -> str:
    return "Context:\n" + "\n\n".join(chunks) + f"\n\nQuestion: {question}"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


class Chat:
    """A client that sends the whole history with every question."""

    def __init__(self, engine: ProphetKVEngine, **settings: Any) -> None:
        self.engine = engine
        self.settings = {"max_new_tokens": 8, **settings}
        self.messages: list[dict[str, str]] = []

    def ask(self, content: str, **settings: Any) -> GenerationResult:
        self.messages.append(user(content))
        answer = self.engine.generate(self.messages, **{**self.settings, **settings})
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer


@contextmanager
def counted_rows(engine: ProphetKVEngine) -> Iterator[list[int]]:
    """Count the rows that enter the model's last layer: one entry a pass."""
    rows: list[int] = []
    layer = engine.model.model.layers[-1]
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    try:
        yield rows
    finally:
        handle.remove()


def full_prefill(model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The model's own forward, by plain transformers: the last token's logits and the cache's layers."""
    cache = DynamicCache()
    with torch.no_grad():
        logits = model(input_ids, **cache_argument(model, cache), use_cache=True).logits[:, -1]
    return logits.float(), cache.layers


def divergence(logits: torch.Tensor, truth: torch.Tensor) -> float:
    """KL of full prefill's next token to that of `logits`, in nats."""
    return float(F.kl_div(logits.log_softmax(-1), truth.log_softmax(-1), log_target=True, reduction="sum"))


def prompt_ids(engine: ProphetKVEngine, messages: Sequence[dict[str, str]]) -> torch.Tensor:
    return engine.read(list(messages)).input_ids[None]


def kept_rows(engine: ProphetKVEngine, ids: torch.Tensor, tenant: str = "") -> Any:
    """What the engine would take over for these ids: its rows, side by side, one pair a layer."""
    held = engine.conversations.match(ids[0], tenant)
    pairs = []
    for layer in range(len(engine.support.layers)):
        parts = [part.rows[layer] for part in held.parts]
        keys, values = (torch.cat([part[which] for part in parts], dim=1)[:, : held.length] for which in (0, 1))
        pairs.append((keys, values))
    return held, pairs
