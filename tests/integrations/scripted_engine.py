"""An engine whose words are given and whose prefills are real, so that an agent takes as many steps as a test wants."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine, ReuseReport
from tests.integrations.taught import tool_tokenizer
from tests.tiny import tiny_llama


class ScriptedEngine(ProphetKVEngine):
    """Prefills each prompt, decodes one token, and then says what the script has next."""

    def __init__(self, words: Sequence[str], tokenizer: Any = None) -> None:
        super().__init__(
            tiny_llama(max_position_embeddings=8192),
            tokenizer or tool_tokenizer(),
            config=ProphetKVConfig(encoding="plain", recompute_ratio=0.2),
        )
        self.words = list(words)
        self.reports: list[ReuseReport] = []

    def stream(self, prompt: Any, **settings: Any) -> Generator[Any, None, None]:
        words = self.words[len(self.reports)]
        for piece in super().stream(prompt, **{**settings, "max_new_tokens": 1, "grammar": None}):
            if piece.finish_reason is not None:
                self.reports.append(piece.report)
                yield replace(piece, delta=words, text=words, finish_reason="stop")


def check_steps(engine: ScriptedEngine, *, statuses: Sequence[str] = ("hit", "miss", "remembered")) -> None:
    """After the first step only what is new was computed, and found chunks came from their caches or stayed."""
    assert len(engine.reports) == len(engine.words)
    for before, report in zip(engine.reports, engine.reports[1:], strict=False):
        assert report.moved_tokens == 0
        parts = (report.remembered_tokens, report.reused_tokens, report.recomputed_tokens, report.fresh_tokens)
        assert sum(parts) == report.prompt_tokens
        new = report.prompt_tokens - before.prompt_tokens
        loaded = sum(chunk.tokens for chunk in report.chunks if chunk.status != "remembered")
        assert report.fresh_tokens <= new - loaded + 4
        assert report.remembered_tokens + report.recomputed_tokens >= before.prompt_tokens - 4
        chunk_tokens = sum(chunk.tokens for chunk in report.chunks)
        assert report.recomputed_tokens <= 0.2 * chunk_tokens
        assert {chunk.status for chunk in report.chunks} <= set(statuses)
