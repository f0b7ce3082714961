"""`ProphetKVLLM`: the engine as a LlamaIndex language model."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index.events import ReportAnnouncer
from prophetkv_rag.integrations.llama_index.messages import Message, message_text, to_template_messages
from prophetkv_rag.integrations.llama_index.predict import QueryAwareLLM
from prophetkv_rag.integrations.llama_index.refusal import refusing
from prophetkv_rag.integrations.llama_index.responses import responses, to_chat_response, to_completion
from prophetkv_rag.integrations.shared import iterate_in_thread, last_item
from prophetkv_rag.prompt import Prompt

if TYPE_CHECKING:
    from prophetkv_rag.config import ProphetKVConfig
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.generation import GenerationResult, StreamChunk
    from prophetkv_rag.report import ReuseReport
    from prophetkv_rag.store import ChunkStore

AnyPrompt = str | list[Message] | Prompt

CALL_OPTIONS = (
    *("max_new_tokens", "temperature", "top_p", "stop", "seed"),
    *("strategy", "recompute_ratio", "query", "deadline_s"),
)
"""Keyword arguments of a single call that reach the engine; `max_tokens` is read as `max_new_tokens`."""


class ProphetKVLLM(QueryAwareLLM):
    """A local model that answers from retrieved chunks by reusing their KV caches.

    Use it as any LlamaIndex LLM: `index.as_query_engine(llm=llm)`, chat engines, response synthesizers, agents. Chunks
    indexed through the same engine (`ProphetKVChromaVectorStore`) are recognised in the prompt by their text; a prompt
    without any is answered by plain full prefill. Every field is a default that a call may override by a keyword
    argument of the same name: `llm.complete(prompt, temperature=0.7, recompute_ratio=0.3)`; arguments that mean
    nothing to this model are ignored.

    **Where the reuse report is.** Every `ChatResponse` and `CompletionResponse` carries it in `raw`, as plain numbers.
    A query engine's `Response` does not keep `raw`; there are other ways to see it nevertheless:

    - `llm.last_report`, the report of the most recent call on this object: enough for scripts and notebooks.
    - LlamaIndex's instrumentation, for every call of a query (`refine` makes one per chunk) and for many threads: a
      `ReuseReportEvent` before a call's first token, and `raw` in `LLMChatEndEvent.response`, or
      `LLMCompletionEndEvent.response` for a model without a chat template. Wrap a query in
      `instrument_tags({"request": 7})` to find its events by `event.tags`.

    **Stopping.** Async methods never block the event loop. Leaving a stream early, or cancelling a task, stops the
    generation. LlamaIndex's chat engines read their stream to its end in a thread of their own, whoever listens: give
    them `llm.cancelled_by(event)`, and set the event. `deadline_s` ends an answer after so many seconds as it is then
    (`raw["finish_reason"]` says `"deadline"`), or by `DeadlineError` if it had not begun.

    **Errors.** A prompt that does not fit, and a setting that makes no sense, are a `CallRefusedError`.

    Example:
        ```python
        llm = ProphetKVLLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", max_new_tokens=128)
        print(llm.complete("Who wrote Faust?"), llm.last_report)
        ```
    """

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

    _engine: Any = PrivateAttr(default=None)
    _last_report: Any = PrivateAttr(default=None)
    _cancel: Any = PrivateAttr(default=None)

    def __init__(self, engine: ProphetKVEngine | None = None, **fields: Any) -> None:
        if engine is None or engine.tokenizer is None:
            missing = "an engine" if engine is None else "an engine with a tokenizer"
            msg = f"ProphetKVLLM needs {missing}: ProphetKVLLM(engine=...) or ProphetKVLLM.from_pretrained(name)"
            raise InputError(msg)
        fields["model_name"] = fields.get("model_name") or _name_of(engine.model)
        super().__init__(**fields)
        self.context_window = min(self.context_window or engine.context_window, engine.context_window)
        self._engine = engine

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        config: ProphetKVConfig | None = None,
        store: ChunkStore | None = None,
        **fields: Any,
    ) -> ProphetKVLLM:
        """Load a model into an engine of its own; `llm.engine` is what vector stores need.

        Args:
            name_or_path: Hub name or local directory, in transformers' format.
            config: The engine's settings.
            store: Where chunk caches are kept; RAM by default.
            **fields: Fields of this class.
        """
        from prophetkv_rag.engine import ProphetKVEngine

        return cls(engine=ProphetKVEngine.from_pretrained(name_or_path, config=config, store=store), **fields)

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised pipelines."""
        return "ProphetKVLLM"

    @property
    def engine(self) -> ProphetKVEngine:
        """The engine; copies of this object share it."""
        if self._engine is None:
            msg = "this ProphetKVLLM was unpickled without its engine; make a new one: ProphetKVLLM(engine=...)"
            raise InputError(msg)
        return self._engine

    @property
    def metadata(self) -> LLMMetadata:
        """Window, answer length, and whether the model chats: it does if its tokenizer has a chat template.

        LlamaIndex counts the words of messages, not what the chat template writes around them: the window given here is
        smaller by that.
        """
        return LLMMetadata(
            context_window=max(1, self.context_window - self._template_tokens()),
            num_output=self.max_new_tokens,
            is_chat_model=self.engine.has_chat_template,
            model_name=self.model_name,
        )

    @property
    def last_report(self) -> ReuseReport | None:
        """What the most recent call on this object reused; `None` before the first. A stream sets it when it starts.

        Safe to read from any thread, but with several at work it is whichever call came last: see the class docstring.
        """
        return self._last_report

    def render(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """Return the whole text that the model reads for a filled template, its chat template's words included."""
        if not self.metadata.is_chat_model:
            return self._get_prompt(prompt, **prompt_args)
        messages = self._from_messages(self._get_messages(prompt, **prompt_args))
        return messages if isinstance(messages, str) else self.engine.library.tokens.render(messages)

    def cancelled_by(self, event: threading.Event) -> ProphetKVLLM:
        """Return a copy on the same engine whose calls all stop once `event` is set, with what they have by then.

        For callers who cannot close the stream themselves: `index.as_chat_engine(llm=llm.cancelled_by(event))`.
        """
        twin = self.model_copy()
        twin._cancel = event
        return twin

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer chat messages."""
        return to_chat_response(self._generate(self._from_messages(messages), kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Async twin of `chat`; cancelling it stops the generation."""
        return to_chat_response(await self._finish(self._from_messages(messages), kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer chat messages piece by piece."""
        return responses(self._stream(self._from_messages(messages), kwargs), to_chat_response)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Async twin of `stream_chat`."""
        return self._astream(self._from_messages(messages), kwargs, to_chat_response)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt: as one user message if the model chats, or as it stands if `formatted`."""
        return to_completion(self._generate(self._from_text(prompt, formatted, kwargs), kwargs))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Async twin of `complete`; cancelling it stops the generation."""
        return to_completion(await self._finish(self._from_text(prompt, formatted, kwargs), kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt piece by piece."""
        return responses(self._stream(self._from_text(prompt, formatted, kwargs), kwargs), to_completion)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Async twin of `stream_complete`."""
        return self._astream(self._from_text(prompt, formatted, kwargs), kwargs, to_completion)

    def _from_messages(self, messages: Sequence[ChatMessage]) -> str | list[Message]:
        """Return what the engine takes: template messages, or text where the model or the caller has another format."""
        if self.engine.has_chat_template and self.messages_to_prompt is generic_messages_to_prompt:
            return to_template_messages(messages, self.engine.tokenizer)
        for message in messages:
            message_text(message)  # refuses images, which a text format would silently leave out
        return self.messages_to_prompt(messages)

    def _from_text(self, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> AnyPrompt:
        if isinstance(kwargs.get("parts"), Prompt):  # from ProphetKVSynthesizer, which knows where the chunks are
            return kwargs["parts"]
        if formatted:
            return prompt
        if self.completion_to_prompt is not default_completion_to_prompt:
            return self.completion_to_prompt(prompt)
        return [{"role": "user", "content": prompt}] if self.engine.has_chat_template else prompt

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

    def _template_tokens(self) -> int:
        """Return how many tokens the chat template adds to a system and a user message."""
        if not self.engine.has_chat_template:
            return 0
        messages = [ChatMessage(role=role, content="x") for role in ("system", "user")]
        tokens = self.engine.library.tokens
        rendered = tokens.render(to_template_messages(messages, self.engine.tokenizer))
        return len(tokens.fresh(rendered, first=True)) - len(messages)


def _name_of(model: Any) -> str:
    """Return the model's hub name, or the last part of the directory it was loaded from."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).is_dir() else name
