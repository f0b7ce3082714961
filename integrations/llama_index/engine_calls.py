"""Calls of an LLM on its engine: what a call may set, how it runs and stops, and where its report goes."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index.events import ReportAnnouncer
from prophetkv_rag.integrations.llama_index.predict import QueryAwareLLM
from prophetkv_rag.integrations.llama_index.refusal import refusing
from prophetkv_rag.integrations.llama_index.responses import responses
from prophetkv_rag.integrations.shared import iterate_in_thread, last_item

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.generation import GenerationResult, StreamChunk
    from prophetkv_rag.prompt import AnyPrompt
    from prophetkv_rag.report import ReuseReport

CALL_OPTIONS = (
    *("max_new_tokens", "temperature", "top_p", "stop", "seed"),
    *("strategy", "recompute_ratio", "query", "deadline_s", "grammar", "remember", "tenant"),
)
"""Keyword arguments of a single call that reach the engine; `max_tokens` is read as `max_new_tokens`."""


class EngineLLM(QueryAwareLLM):
    """An LLM whose calls run on a `ProphetKVEngine`; see `ProphetKVLLM` for what its fields are to a caller."""

    model_name: str = Field(default="", description="Name shown in events and logs; by default the model's own.")
    context_window: int = Field(
        default=0, description="Tokens of prompt and answer together; at most, and by default, the engine's.", ge=0
    )
    max_new_tokens: int = Field(default=256, description="Most tokens that one answer may have.", gt=0)
    temperature: float = Field(default=0.0, description="Sampling temperature; 0 takes the likeliest token.", ge=0.0)
    top_p: float = Field(default=1.0, description="Sample from the likeliest tokens of this mass.", gt=0.0, le=1.0)
    stop: list[str] = Field(default_factory=list, description="Texts that end an answer; not part of it.")
    strategy: str | None = Field(default=None, description="Selection strategy; None for the engine's setting.")
    recompute_ratio: float | None = Field(
        default=None, description="Share of chunk tokens recomputed; None for the engine's setting.", ge=0.0, le=1.0
    )
    deadline_s: float | None = Field(default=None, description="Seconds that one call may take; None for no limit.")
    remember: bool | None = Field(
        default=None,
        description="Whether calls go on from former prompts that begin alike; None: the engine's setting.",
    )
    tenant: str = Field(default="", description="Whose conversations these are; those of others are never used.")

    _engine: Any = PrivateAttr(default=None)
    _last_report: Any = PrivateAttr(default=None)
    _cancel: Any = PrivateAttr(default=None)

    @property
    def engine(self) -> ProphetKVEngine:
        """The engine; copies of this object share it."""
        if self._engine is None:
            msg = "this ProphetKVLLM was unpickled without its engine; make a new one: ProphetKVLLM(engine=...)"
            raise InputError(msg)
        return self._engine

    @property
    def last_report(self) -> ReuseReport | None:
        """What the most recent call on this object reused; `None` before the first. A stream sets it when it starts.

        Safe to read from any thread, but with several at work it is whichever call came last: see `ProphetKVLLM`.
        """
        return self._last_report

    def cancelled_by(self, event: threading.Event) -> Self:
        """Return a copy on the same engine whose calls all stop once `event` is set, with what they have by then.

        For callers who cannot close the stream themselves: `index.as_chat_engine(llm=llm.cancelled_by(event))`.
        """
        twin = self.model_copy()
        twin._cancel = event
        return twin

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the engine's keyword arguments: this object's fields, overridden by those of the call."""
        call = {name: kwargs[name] for name in CALL_OPTIONS if kwargs.get(name) is not None}
        if kwargs.get("max_tokens") is not None:
            call.setdefault("max_new_tokens", kwargs["max_tokens"])
        if isinstance(call.get("stop"), str):
            call["stop"] = [call["stop"]]
        fields = {name: getattr(self, name) for name in CALL_OPTIONS if name in type(self).model_fields}
        return fields | call

    def _generate(self, prompt: AnyPrompt, kwargs: dict[str, Any]) -> GenerationResult:
        announce = ReportAnnouncer(self.model_name)
        with refusing():
            result = self.engine.generate(prompt, cancel=self._cancel, **self._options(kwargs))
        self._last_report = result.report
        announce(result.report)
        return result

    def _stream(
        self, prompt: AnyPrompt, kwargs: dict[str, Any], cancel: threading.Event | None = None
    ) -> Generator[StreamChunk, None, None]:
        announce = ReportAnnouncer(self.model_name)
        chunks = self.engine.stream(prompt, cancel=self._cancel or cancel, **self._options(kwargs))

        def recorded() -> Generator[StreamChunk, None, None]:
            with closing(chunks), refusing():
                for chunk in chunks:
                    self._last_report = chunk.report
                    announce(chunk.report)
                    yield chunk

        return recorded()

    async def _finish(self, prompt: AnyPrompt, kwargs: dict[str, Any]) -> StreamChunk:
        left = threading.Event()  # a call that waits for the model is stopped too
        return await last_item(self._stream(prompt, kwargs, left), on_leave=left.set)

    def _astream(
        self, prompt: AnyPrompt, kwargs: dict[str, Any], to_response: Callable[..., Any]
    ) -> AsyncGenerator[Any, None]:
        left = threading.Event()
        return iterate_in_thread(responses(self._stream(prompt, kwargs, left), to_response), on_leave=left.set)
