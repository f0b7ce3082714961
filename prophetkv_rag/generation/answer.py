"""One answer from beginning to end: a prompt is prefilled, then decoded, as far as window and caller allow."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

import torch

from prophetkv_rag.errors import DeadlineError
from prophetkv_rag.generation.constraint import Constraint
from prophetkv_rag.generation.decode import StreamChunk, decode_tokens
from prophetkv_rag.generation.interrupt import Interrupted, InterruptibleLock
from prophetkv_rag.generation.sampling import SamplingSettings
from prophetkv_rag.generation.steps import Steps
from prophetkv_rag.model import LayerSupport, complete_cache
from prophetkv_rag.report import ReuseReport, trace_generation


class FilledCache(Protocol):
    """What a prefill comes to: a cache of N tokens that `generate` could go on from, and what it took."""

    @property
    def past_key_values(self) -> Any:
        """A transformers cache of all N tokens."""

    @property
    def input_ids(self) -> torch.Tensor:
        """`[1, N]`."""

    @property
    def logits(self) -> torch.Tensor:
        """`[1, vocab]` of the last token."""

    @property
    def report(self) -> ReuseReport:
        """Goes with every piece of the answer."""

    @property
    def answered(self) -> Any:
        """What `keep` is told of the prompt; small, and `None` if nothing is to be kept."""


Keep = Callable[[Any, Sequence[Any], Sequence[int]], None]
"""Takes a prompt's `answered`, the layers of its cache, which have rows for most of the answer too, and the answer."""


def stream_answer(
    prefill: Callable[[], FilledCache],
    model: Any,
    settings: SamplingSettings,
    *,
    context_window: int,
    end_tokens: frozenset[int],
    to_text: Callable[[Sequence[int]], str],
    model_lock: InterruptibleLock,
    check: Callable[[], None] = lambda: None,
    constraint: Constraint | None = None,
    keep: Keep | None = None,
    layers: Sequence[LayerSupport] = (),
) -> Generator[StreamChunk, None, None]:
    """Prefill a prompt and generate from it.

    Args:
        prefill: Called once; holds `model_lock` while the model runs, so it may raise `Interrupted`.
        model: The language model.
        settings: How tokens are chosen and when to stop.
        context_window: Most tokens of prompt and answer together.
        end_tokens: Tokens that end the answer.
        to_text: Turns generated tokens into text.
        model_lock: Of this call; says when it must stop.
        check: See `Steps`.
        constraint: See `decode_tokens`.
        keep: Called once the answer has ended, in whatever way.
        layers: See `Steps`.

    Yields:
        Pieces of the answer; the last one has a finish reason. The span of the decoding is ended with it.

    Raises:
        DeadlineError: If the deadline passes before the prefill.
    """
    try:
        filled = prefill()
    except BaseException as error:
        model_lock.leave()
        if not isinstance(error, Interrupted):
            raise
        interrupted = error
        yield _stopped_before_prefill(interrupted)
        return
    room = context_window - filled.report.prompt_tokens
    cache, answered = complete_cache(filled.past_key_values), filled.answered
    pieces = decode_tokens(
        Steps(model, cache, model_lock, check, layers),
        filled.input_ids,
        filled.logits,
        replace(settings, max_new_tokens=min(settings.max_new_tokens, room)),
        end_tokens=end_tokens,
        to_text=to_text,
        report=filled.report,
        constraint=constraint,
    )
    del filled  # decoding replaces the cache's tensors; the prompt's must not be kept beside them
    token_ids: Sequence[int] = ()
    try:
        with closing(trace_generation(pieces)) as traced:
            for piece in traced:
                token_ids = piece.token_ids
                yield piece
    finally:
        model_lock.leave()
        if keep is not None and answered is not None:
            keep(answered, cache.layers, token_ids)


def _stopped_before_prefill(interrupted: Interrupted) -> StreamChunk:
    """Return the only piece of an answer that was cancelled before its prefill: empty, with an empty report.

    Raises:
        DeadlineError: If it was not cancelled but came too late.
    """
    if interrupted.reason == "deadline":
        msg = "the deadline passed before the prompt was prefilled; give a longer deadline_s, or call again later"
        raise DeadlineError(msg)
    report = ReuseReport(
        "none", 0.0, prompt_tokens=0, chunk_tokens=0, reused_tokens=0, recomputed_tokens=0, fresh_tokens=0
    )
    return StreamChunk("", "", (), "cancelled", report)
