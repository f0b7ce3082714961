"""`ChatProphetKV`: the engine as a LangChain chat model."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import PrivateAttr

from prophetkv_rag.errors import InputError
from prophetkv_rag.generation import Grammar
from prophetkv_rag.integrations.langchain.messages import holds_document_repr, to_template_messages
from prophetkv_rag.integrations.langchain.responses import metadata, usage
from prophetkv_rag.integrations.langchain.settings import EngineModel, cancel_on_leave
from prophetkv_rag.integrations.langchain.structured import structured_output
from prophetkv_rag.integrations.langchain.together import generate_together
from prophetkv_rag.integrations.langchain.tool_calls import split_calls
from prophetkv_rag.integrations.shared import iterate_in_thread
from prophetkv_rag.tools import ToolRun, check_choice, check_tools, find_tool_format, response_schema

if TYPE_CHECKING:
    from langchain_core.language_models.model_profile import ModelProfile

logger = logging.getLogger(__name__)

REPR_WARNING = (
    "the prompt holds retrieved documents as Python source (Document(metadata=...)): the model reads escaped text, "
    "and chunks with line breaks cannot be reused; format them: {'context': retriever | format_docs, ...} with "
    "def format_docs(docs): return '\\n\\n'.join(doc.page_content for doc in docs)"
)


class ChatProphetKV(EngineModel, BaseChatModel):
    """A local chat model that answers from retrieved chunks by reusing their KV caches.

    Use it as any LangChain chat model: in chains, agents and LCEL. Documents in a `ProphetKVChroma` on the same engine
    are recognised in the prompt by their text; a prompt without any is answered by plain full prefill. Fields are
    defaults that a call may override: `model.invoke(prompt, temperature=0.7, recompute_ratio=0.3)`.

    **What was reused** is in every message, and in a stream's last: `usage_metadata["input_token_details"]` has the
    tokens reused (`cache_read`) and recomputed, `response_metadata["prophetkv"]` the whole report. Callbacks find
    both in `response.generations[0][0].message`.

    **Stopping.** Async calls and streams stop when they are cancelled or closed, and so does `model.stream(...)`. A
    *chain's* sync stream does not: LangChain reads the model to its end when such a stream is closed. Pass an event,
    `chain.stream(x, {"configurable": {"prophetkv_cancel": event}})`, and set it; or `timeout=` seconds.

    **Tools** work where the model's chat template shows them and writes calls as JSON; structured output always does.

    Example:
        ```python
        model = ChatProphetKV.from_pretrained("Qwen/Qwen2.5-7B-Instruct", max_tokens=128)
        store = ProphetKVChroma.from_documents(documents, embeddings, engine=model.engine)
        chain = create_retrieval_chain(store.as_retriever(), create_stuff_documents_chain(model, prompt))
        ```
    """

    _has_warned: bool = PrivateAttr(default=False)

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if not self._ready_engine().has_chat_template:
            msg = "this model's tokenizer has no chat template; set tokenizer.chat_template, or use ProphetKVLLM"
            raise InputError(msg)

    @property
    def _llm_type(self) -> str:
        return "prophetkv-chat"

    def _resolve_model_profile(self) -> ModelProfile:
        return {
            "max_input_tokens": self._ready_engine().context_window,
            "text_inputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "tool_calling": self.supports_tools,
            "structured_output": True,
        }

    @property
    def supports_tools(self) -> bool:
        """Whether `bind_tools` works with this model's chat template."""
        try:
            find_tool_format(self._ready_engine().tokenizer)
        except InputError:
            return False
        return True

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Show tools to the model.

        Args:
            tools: Anything that LangChain takes for a tool.
            tool_choice: A tool's name, or `"any"` (also `"required"`, `True`), makes the answer a call; `"none"` hides
                the tools; `None` or `"auto"` leaves it to the model. A call's arguments meet the tool's schema.
            strict: As in `convert_to_openai_tool`.
            **kwargs: More arguments of each call.

        Raises:
            InputError: If the model's chat template shows no tools or writes no JSON calls, or for an unknown choice.
        """
        if tools:  # agents bind none, too
            find_tool_format(self._ready_engine().tokenizer)
        shown = check_tools([convert_to_openai_tool(tool, strict=strict) for tool in tools])
        check_choice(tool_choice, [tool["function"]["name"] for tool in shown])
        return self.bind(tools=shown, tool_choice=tool_choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a model whose answers are JSON of this schema, parsed; an answer that was cut off is an error.

        Args:
            schema: A pydantic model, a `TypedDict` or a JSON schema.
            include_raw: Give `{"raw": message, "parsed": ..., "parsing_error": ...}`.
            method: `"function_calling"` shows the schema to the model as a tool that it must call; the default where
                the chat template shows tools. `"json_schema"` holds the answer itself to the schema, and says nothing
                of it in the prompt; the default elsewhere. `"json_mode"` asks for any JSON object.
            **kwargs: More arguments of each call.

        Raises:
            InputError: If the schema or the method cannot be used.
        """
        kwargs.pop("strict", None)  # it is kept in any case
        method = method or ("function_calling" if self.supports_tools else "json_schema")
        return structured_output(self, schema, method=method, include_raw=include_raw, more=kwargs)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of the whole prompt, as the model's chat template renders it; no messages are none."""
        if not messages:
            return 0
        shown = [convert_to_openai_tool(tool) for tool in tools or ()]
        tokens = self._ready_engine().library.tokens
        return len(self.get_token_ids(tokens.render(to_template_messages(messages), tools=shown)))

    def generate(self, messages: list[list[BaseMessage]], *args: Any, **kwargs: Any) -> LLMResult:
        """As LangChain's own; several prompts are answered together."""
        if len(messages) < 2:
            return super().generate(messages, *args, **kwargs)
        whole = super().generate

        def one(prompt: list[list[BaseMessage]], run_id: Any) -> LLMResult:
            return whole(prompt, *args, **{**kwargs, "run_id": run_id})

        return generate_together(one, messages, kwargs.get("run_id"), most=self._ready_engine().turns.most)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._pieces(messages, self._engine_settings(stop, kwargs), kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        async with aclosing(self._apieces(messages, stop, kwargs)) as pieces:
            return generate_from_stream(iter([piece async for piece in pieces]))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with closing(self._pieces(messages, self._engine_settings(stop, kwargs), kwargs)) as pieces:
            for piece in pieces:
                if run_manager:
                    run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(self._apieces(messages, stop, kwargs)) as pieces:
            async for piece in pieces:
                if run_manager:
                    await run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece

    def _apieces(
        self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, call: dict[str, Any]
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        """Async twin of `_pieces`. The call's settings are read here and now: in the caller's context."""
        settings = self._engine_settings(stop, call)
        leave = cancel_on_leave(settings)
        return iterate_in_thread(self._pieces(messages, settings, call), on_leave=leave)

    def _pieces(
        self, messages: Sequence[BaseMessage], settings: dict[str, Any], call: dict[str, Any]
    ) -> Generator[ChatGenerationChunk, None, None]:
        """Answer piece by piece; the last one has the usage and the report."""
        if call.get("tools") and call.get("tool_choice") != "none":
            return self._tool_pieces(messages, settings, call)
        schema = response_schema(call.get("response_format"))
        if schema is not None:
            settings["grammar"] = Grammar.json_schema(schema)
        return self._text_pieces(messages, settings)

    def _text_pieces(
        self, messages: Sequence[BaseMessage], settings: dict[str, Any]
    ) -> Generator[ChatGenerationChunk, None, None]:
        prompt = to_template_messages(messages)
        with closing(self._run(prompt, settings)) as chunks:
            for chunk in chunks:
                if chunk.finish_reason is None:
                    yield ChatGenerationChunk(message=AIMessageChunk(content=chunk.delta))
                    continue
                self._warn_of_reprs(prompt)
                last = AIMessageChunk(
                    content=chunk.delta,
                    usage_metadata=usage(chunk),
                    response_metadata=metadata(chunk, self.model_name),
                    chunk_position="last",
                )
                yield ChatGenerationChunk(message=last)

    def _tool_pieces(
        self, messages: Sequence[BaseMessage], settings: dict[str, Any], call: dict[str, Any]
    ) -> Generator[ChatGenerationChunk, None, None]:
        engine, prompt = self._ready_engine(), to_template_messages(messages)
        run = ToolRun(
            engine.tokens,
            engine.chunk_index,
            prompt,
            call["tools"],
            call.get("tool_choice"),
            parallel=call.get("parallel_tool_calls") is not False,
            answer=response_schema(call.get("response_format")),
        )
        query = settings["query"] or run.settings["query"]
        with closing(self._run(run.prompt, {**settings, **run.settings, "query": query})) as chunks:
            for chunk in chunks:
                text = run.add(chunk).text
                if chunk.finish_reason is None:
                    if text:
                        yield ChatGenerationChunk(message=AIMessageChunk(content=text))
                    continue
                self._warn_of_reprs(prompt)
                calls, invalid, more = split_calls(run.calls)
                last = AIMessageChunk(
                    content=text,
                    tool_calls=calls,
                    invalid_tool_calls=invalid,
                    usage_metadata=usage(chunk),
                    response_metadata=metadata(chunk, self.model_name, run.finish_reason(chunk)) | more,
                    chunk_position="last",
                )
                yield ChatGenerationChunk(message=last)

    def _warn_of_reprs(self, prompt: Sequence[dict[str, Any]]) -> None:
        if not self._has_warned and holds_document_repr(prompt, self._ready_engine().chunk_index):
            self._has_warned = True
            logger.warning(REPR_WARNING)
