"""Spans of the engine's stages, seen by the OpenTelemetry SDK's own in-memory exporter."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from prophetkv_rag import Prompt, ProphetKVEngine
from prophetkv_rag.report import tracing
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

CHUNKS = [text_of(40, seed=1), text_of(40, seed=2)]
PROMPT = Prompt("Read: ", CHUNKS, "What?")


@pytest.fixture(scope="module")
def engine() -> ProphetKVEngine:
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    engine.add_chunks(CHUNKS)
    return engine


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What our own tracer records; the process-wide provider, which can be set only once, is left alone."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_api", lambda: (trace, provider.get_tracer("prophetkv_rag")))
    yield exporter
    provider.shutdown()


class OneClock:
    """The time of day and what measures lengths, as one clock: a machine may stand still between reading two."""

    @staticmethod
    def perf_counter() -> float:
        return time.perf_counter()

    @staticmethod
    def time_ns() -> int:
        return int(time.perf_counter() * 1e9)


def test_a_generation_is_five_spans_in_order(
    engine: ProphetKVEngine, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "time", OneClock)
    before = OneClock.time_ns()
    result = engine.generate(PROMPT, max_new_tokens=3)
    after = OneClock.time_ns()
    found = spans.get_finished_spans()
    names = ["match", "load", "score", "recompute", "generate"]
    assert [span.name for span in found] == [f"prophetkv.{name}" for name in names]
    assert found[1].attributes["prophetkv.hits"] == 2
    assert found[4].attributes["prophetkv.generated_tokens"] == len(result.token_ids)
    assert found[4].attributes["prophetkv.finish_reason"] == result.finish_reason
    stages = found[:4]  # the last is told by OpenTelemetry's own clock
    starts = [span.start_time for span in stages]
    assert starts == sorted(starts)
    rounded = 1_000  # ns, by what a float of seconds keeps
    assert before - rounded <= starts[0]
    assert all(span.start_time <= span.end_time <= after + rounded for span in stages)
    assert found[4].start_time <= found[4].end_time
    for span, seconds in zip(found, (result.report.timings_s.match, result.report.timings_s.load), strict=False):
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(seconds, abs=1e-6)


def test_spans_hang_under_the_callers(engine: ProphetKVEngine, spans: InMemorySpanExporter) -> None:
    with tracing._api()[1].start_as_current_span("request") as parent:
        engine.generate(PROMPT, max_new_tokens=2)
    ours = [span for span in spans.get_finished_spans() if span.name.startswith("prophetkv.")]
    assert len(ours) == 5
    assert {span.parent.span_id for span in ours} == {parent.get_span_context().span_id}


def test_a_closed_stream_ends_its_span(engine: ProphetKVEngine, spans: InMemorySpanExporter) -> None:
    stream = engine.stream(PROMPT, max_new_tokens=50)
    next(stream)
    stream.close()
    [span] = [span for span in spans.get_finished_spans() if span.name == "prophetkv.generate"]
    assert span.attributes["prophetkv.finish_reason"] == "closed"
    assert span.status.is_unset


def test_an_error_marks_the_span(spans: InMemorySpanExporter) -> None:
    def pieces() -> Generator[Any, None, None]:
        msg = "out of memory"
        raise RuntimeError(msg)
        yield

    with pytest.raises(RuntimeError, match="out of memory"):
        list(tracing.trace_generation(pieces()))
    [span] = spans.get_finished_spans()
    assert span.status.description == "out of memory"
    assert [event.name for event in span.events] == ["exception"]


def test_full_prefill_has_neither_load_nor_score(engine: ProphetKVEngine, spans: InMemorySpanExporter) -> None:
    engine.prefill(PROMPT, strategy="full_prefill")
    assert [span.name for span in spans.get_finished_spans()] == ["prophetkv.match", "prophetkv.recompute"]


def test_without_the_package_nothing_happens(tmp_path: Path) -> None:
    """In a process where it cannot be imported."""
    code = (
        "import sys, time; sys.modules['opentelemetry'] = None; from prophetkv_rag.report import tracing; "
        "assert tracing._api() is None; assert tracing.end_stage('match', time.perf_counter()) >= 0; "
        "assert list(tracing.trace_generation(x for x in 'ab')) == ['a', 'b']; print('ok')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.stdout.strip() == "ok", result.stderr
