"""Generation from a filled cache: a plain decode loop over the model's own forward, as an iterator.

One loop serves `generate` and `stream`. It is a generator, so closing it stops at once and frees the cache; there is no
background thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch

from prophetkv_rag.generation.constraint import Constraint
from prophetkv_rag.generation.interrupt import Interrupted
from prophetkv_rag.generation.sampling import Sampler, SamplingSettings
from prophetkv_rag.generation.steps import Steps
from prophetkv_rag.model import own_state
from prophetkv_rag.report import ReuseReport

FinishReason = Literal["stop", "length", "cancelled", "deadline"]
"""`"cancelled"` and `"deadline"`: stopped from outside; the answer is what there was by then."""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """An answer: its text, its tokens (without the end token), why it ended, and what the prefill reused."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    report: ReuseReport


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """A piece of an answer. `text` is the answer so far; `finish_reason` is `None` until the last piece."""

    delta: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    report: ReuseReport


def whole_answer(pieces: Iterable[StreamChunk]) -> GenerationResult:
    """Return an answer at once, from all of its pieces."""
    for last in pieces:  # noqa: B007  # only the last piece is kept
        pass
    assert last.finish_reason is not None
    return GenerationResult(last.text, last.token_ids, last.finish_reason, last.report)


def end_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the generation config's, and the tokenizer's own."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(token) for token in value)
    return frozenset(found)


class _TextBuffer:
    """Decides how much of the text so far may be shown: no half characters, nothing that may become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.shown = 0

    def update(self, text: str, *, is_last: bool) -> tuple[str, bool]:
        """Return (text that may be shown so far, whether a stop string was reached)."""
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            return text[: min(found)], True
        if is_last:
            return text, False
        safe = len(text.rstrip("\ufffd"))  # decoders with byte fallback show one for each pending byte
        for stop in self.stop:
            for size in range(min(len(stop) - 1, safe), 0, -1):
                if text[:safe].endswith(stop[:size]):
                    safe -= size
                    break
        return text[: max(safe, self.shown)], False


def decode_tokens(
    steps: Steps,
    input_ids: torch.Tensor,
    logits: torch.Tensor,
    settings: SamplingSettings,
    *,
    end_tokens: frozenset[int],
    to_text: Callable[[Sequence[int]], str],
    report: ReuseReport,
    constraint: Constraint | None = None,
) -> Generator[StreamChunk, None, None]:
    """Generate from a filled cache.

    Args:
        steps: Runs the model on from a cache of the whole prompt; each step takes the model for its forward only.
        input_ids: `[1, N]`, the prompt.
        logits: `[1, vocab]` of the prompt's last token.
        settings: How tokens are chosen and when to stop.
        end_tokens: Tokens that end the answer.
        to_text: Turns generated tokens into text.
        report: Passed through to every piece.
        constraint: Says which tokens may come next. What it forces is taken without asking the model. The answer has
            the reason `"stop"` only if it is whole: a stop string counts where it may end, and go on.

    Yields:
        Pieces with new text; the last one carries the finish reason (its delta may be empty).
    """
    sampler, buffer, generated = Sampler(settings, logits.device), _TextBuffer(settings.stop), list[int]()
    unread: list[int] = []  # generated, and not in the cache yet
    finish_reason: FinishReason | None = None
    while finish_reason is None:
        finish_reason = steps.model_lock.reason
        if finish_reason is None and unread:
            try:
                # Entered anew at each step: between them the thread is the caller's.
                with own_state():
                    step = torch.tensor([unread], device=input_ids.device)
                    logits = steps.run(step, input_ids.shape[1])
                    input_ids = torch.cat([input_ids, step], dim=1)
            except Interrupted as interrupted:
                finish_reason = interrupted.reason
        if finish_reason is None:
            with own_state():
                unread = _next_tokens(sampler, constraint, input_ids, logits)
            room = settings.max_new_tokens - len(generated)
            is_cut = len(unread) > room
            kept = list(takewhile(lambda token: token not in end_tokens, unread[:room]))
            generated += kept
            if len(kept) < len(unread[:room]) or (constraint is not None and constraint.is_complete and not is_cut):
                finish_reason = "stop"
            elif len(generated) >= settings.max_new_tokens:
                finish_reason = "length"
        text, stopped = buffer.update(to_text(generated), is_last=finish_reason is not None)
        if stopped and constraint is not None and (constraint.is_complete or not constraint.may_end):
            buffer.stop = ()  # it stands inside what the grammar asks for
            text, stopped = buffer.update(to_text(generated), is_last=finish_reason is not None)
        if stopped:
            finish_reason = "stop"
        delta = text[buffer.shown :]
        buffer.shown = max(buffer.shown, len(text))
        if delta or finish_reason is not None:
            yield StreamChunk(delta, text, tuple(generated), finish_reason, report)


def _next_tokens(
    sampler: Sampler, constraint: Constraint | None, input_ids: torch.Tensor, logits: torch.Tensor
) -> list[int]:
    """Return the next token, and those that can only follow it; at an answer's start, those alone if there are any."""
    if constraint is None:
        return [sampler(input_ids, logits)]
    if forced := constraint.forced():
        return forced
    token = sampler(input_ids, constraint.masked(logits))
    constraint.take(token)
    return [token, *constraint.forced()]
