"""The reuse report as an event of LlamaIndex's instrumentation."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.base import BaseEvent

if TYPE_CHECKING:
    from prophetkv_rag.report import ReuseReport

dispatcher = get_dispatcher(__name__)


class ReuseReportEvent(BaseEvent):
    """A `ProphetKVLLM` has prefilled a prompt; sent once a call, before its first token.

    `report` is `ReuseReport.to_dict()`: plain numbers and strings. `span_id` and `tags` are those of the call, also for
    a stream that is read later and elsewhere.
    """

    model_name: str = Field(description="`ProphetKVLLM.model_name`.")
    report: dict[str, Any] = Field(description="What was reused, and how long each stage took.")

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised events."""
        return "ReuseReportEvent"


class ReportAnnouncer:
    """Sends the event of one call, once, in the context in which the call was made."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._context: contextvars.Context | None = contextvars.copy_context()

    def __call__(self, report: ReuseReport) -> None:
        """Send the event; later calls do nothing."""
        if self._context is not None:
            context, self._context = self._context, None
            context.run(self._send, report)

    def _send(self, report: ReuseReport) -> None:
        dispatcher.event(ReuseReportEvent(model_name=self._model_name, report=report.to_dict()))
