"""`ProphetKVLLM`: the engine as a LlamaIndex language model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.prompts import BasePromptTemplate

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index.prompts import from_messages, from_text, template_tokens
from prophetkv_rag.integrations.llama_index.responses import responses, to_chat_response, to_completion
from prophetkv_rag.integrations.llama_index.tool_calling import ToolCallingLLM, tool_response, tool_responses
from prophetkv_rag.integrations.shared import iterate_in_thread

if TYPE_CHECKING:
    from prophetkv_rag.config import ProphetKVConfig
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.store import ChunkStore


class ProphetKVLLM(ToolCallingLLM):
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

    **Tools** (`FunctionAgent`, `predict_and_call`) work where the model's chat template shows them: `supports_tools`.
    Structured output works with any model: its answers are held to the schema.

    **Errors.** A prompt that does not fit, and a setting that makes no sense, are a `CallRefusedError`.

    Example:
        ```python
        llm = ProphetKVLLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", max_new_tokens=128)
        print(llm.complete("Who wrote Faust?"), llm.last_report)
        ```
    """

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
    def metadata(self) -> LLMMetadata:
        """Window, answer length, and whether the model chats: it does if its tokenizer has a chat template.

        LlamaIndex counts the words of messages, not what the chat template writes around them: the window given here is
        smaller by that.
        """
        return LLMMetadata(
            context_window=max(1, self.context_window - template_tokens(self.engine)),
            num_output=self.max_new_tokens,
            is_chat_model=self.engine.has_chat_template,
            is_function_calling_model=self.supports_tools,
            model_name=self.model_name,
        )

    def render(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """Return the whole text that the model reads for a filled template, its chat template's words included."""
        if not self.metadata.is_chat_model:
            return self._get_prompt(prompt, **prompt_args)
        messages = from_messages(self, self._get_messages(prompt, **prompt_args))
        return messages if isinstance(messages, str) else self.engine.library.tokens.render(messages)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer chat messages."""
        if (run := self._tool_run(messages, kwargs)) is not None:
            result = self._generate(run.prompt, kwargs)
            run.add(result)
            return tool_response(run, result)
        return to_chat_response(self._generate(from_messages(self, messages), kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Async twin of `chat`; cancelling it stops the generation."""
        if (run := self._tool_run(messages, kwargs)) is not None:
            result = await self._finish(run.prompt, kwargs)
            run.add(result)
            return tool_response(run, result)
        return to_chat_response(await self._finish(from_messages(self, messages), kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer chat messages piece by piece."""
        if (run := self._tool_run(messages, kwargs)) is not None:
            return tool_responses(run, self._stream(run.prompt, kwargs))
        return responses(self._stream(from_messages(self, messages), kwargs), to_chat_response)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Async twin of `stream_chat`."""
        if (run := self._tool_run(messages, kwargs)) is not None:
            left = threading.Event()
            pieces = tool_responses(run, self._stream(run.prompt, kwargs, left))
            return iterate_in_thread(pieces, on_leave=left.set)
        return self._astream(from_messages(self, messages), kwargs, to_chat_response)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt: as one user message if the model chats, or as it stands if `formatted`."""
        return to_completion(self._generate(from_text(self, prompt, formatted, kwargs), kwargs))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Async twin of `complete`; cancelling it stops the generation."""
        return to_completion(await self._finish(from_text(self, prompt, formatted, kwargs), kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt piece by piece."""
        return responses(self._stream(from_text(self, prompt, formatted, kwargs), kwargs), to_completion)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Async twin of `stream_complete`."""
        return self._astream(from_text(self, prompt, formatted, kwargs), kwargs, to_completion)


def _name_of(model: Any) -> str:
    """Return the model's hub name, or the last part of the directory it was loaded from."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).is_dir() else name
