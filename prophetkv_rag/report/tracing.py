"""OpenTelemetry spans of the engine's stages, where the OpenTelemetry API is installed; nothing where it is not.

Spans are called `prophetkv.match`, `.load`, `.score`, `.recompute` and `.generate` and are children of whatever span is
current where the engine is called. Without an SDK set up by the application the API discards them.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar


class _Piece(Protocol):
    """What a span tells of a piece of an answer."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def finish_reason(self) -> str | None: ...


P = TypeVar("P", bound=_Piece)


@cache
def _api() -> tuple[Any, Any] | None:
    """Return OpenTelemetry's `trace` module and our tracer, or `None` without the package; asked for once."""
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace, trace.get_tracer("prophetkv_rag")


def end_stage(name: str, started: float, **attributes: int | float | str) -> float:
    """End a stage: record its span and return how long it took.

    Args:
        name: What follows `prophetkv.` in the span's name.
        started: `time.perf_counter()` at the stage's start.
        **attributes: Recorded as `prophetkv.<name>`.

    Returns:
        Seconds since `started`.
    """
    seconds = time.perf_counter() - started
    found = _api()
    if found is not None:
        now = time.time_ns()
        span = found[1].start_span(
            f"prophetkv.{name}", start_time=now - int(seconds * 1e9), attributes=_named(attributes)
        )
        span.end(now)
    return seconds


def trace_generation(pieces: Generator[P, None, None]) -> Generator[P, None, None]:
    """Pass the pieces of an answer on, recording one span from the first step to the last, whoever ends it.

    The span is not made current: between two pieces the caller's own code runs, perhaps in another thread.
    """
    found = _api()
    if found is None:
        yield from pieces
        return
    trace, tracer = found
    span = tracer.start_span("prophetkv.generate")
    last: P | None = None
    try:
        for last in pieces:
            yield last
    except Exception as error:
        span.record_exception(error)
        span.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))
        raise
    finally:
        pieces.close()
        if last is not None:
            reason = last.finish_reason or "closed"
            span.set_attributes(_named({"generated_tokens": len(last.token_ids), "finish_reason": reason}))
        span.end()


def _named(attributes: dict[str, int | float | str]) -> dict[str, int | float | str]:
    return {f"prophetkv.{name}": value for name, value in attributes.items()}
