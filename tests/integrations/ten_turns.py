"""Ten turns through a framework: what each call may compute, found by looking at all former prompts."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch

from prophetkv_rag.prompt import PromptLayout
from prophetkv_rag.reuse.continuing import RECENT
from tests.integrations.scripted_engine import ScriptedEngine

TURNS = 10
RATIO = 0.2
SLACK = 6
"""Tokens of the template that are cut otherwise when they come back."""
QUESTIONS = [f"Question {number}: when does the museum open, and the harbour?" for number in range(TURNS)]
ANSWERS = [f"Answer {number}: the museum opens at ten, the library at nine." for number in range(TURNS)]


class CountedEngine(ScriptedEngine):
    """Notes every prompt as it is laid out."""

    def __init__(self, words: Sequence[str], tokenizer: Any = None) -> None:
        super().__init__(words, tokenizer)
        self.layouts: list[PromptLayout] = []

    def stream(self, prompt: Any, **settings: Any) -> Generator[Any, None, None]:
        self.layouts.append(self.read(prompt, query=settings.get("query")))
        yield from super().stream(prompt, **settings)


def shared(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many tokens two prompts have in common, from the first on."""
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


def check_turns(engine: CountedEngine) -> None:
    """No call computed more than what no former prompt had, the latest messages where they moved, and the share."""
    assert len(engine.reports) == len(engine.layouts) == len(engine.words)
    has_moved = False
    for number, (layout, report) in enumerate(zip(engine.layouts, engine.reports, strict=True)):
        before = [shared(layout.input_ids, other.input_ids) for other in engine.layouts[:number]]
        new = int((~layout.is_chunk[max([*before, layout.known_prefix]) :]).sum())
        assert report.prompt_tokens == layout.num_tokens
        assert report.fresh_tokens <= new - report.moved_tokens + SLACK, number
        has_moved |= report.moved_tokens > 0
        open_tokens = layout.num_tokens if has_moved else layout.num_chunk_tokens  # what moved may be chosen, too
        assert report.recomputed_tokens <= RATIO * open_tokens + 1, number
        parts = (report.remembered_tokens, report.reused_tokens, report.recomputed_tokens, report.fresh_tokens)
        assert sum(parts) == layout.num_tokens


def check_flat(engine: CountedEngine, of_turn: Sequence[int], *, moves: bool = False) -> None:
    """The last turn computes no more than the second, but for the latest messages where the history moves.

    Args:
        engine: After its turns.
        of_turn: The numbers of one kind of call, turn by turn.
        moves: Whether other chunks stand before the history every turn.
    """
    second, last = (engine.reports[of_turn[turn]] for turn in (1, -1))
    assert last.fresh_tokens <= second.fresh_tokens + (RECENT if moves else 0) + SLACK
    assert last.prompt_tokens > second.prompt_tokens + 100 or not moves
    moved = [engine.reports[number].moved_tokens for number in of_turn]
    assert (max(moved) > 50) == moves
