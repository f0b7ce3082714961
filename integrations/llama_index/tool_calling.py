"""Tools: `ProphetKVLLM` as a LlamaIndex function-calling model, where its chat template shows tools."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.types import PydanticProgramMode

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index.engine_calls import EngineLLM
from prophetkv_rag.integrations.llama_index.messages import to_template_messages
from prophetkv_rag.integrations.llama_index.refusal import refusing
from prophetkv_rag.integrations.llama_index.responses import raw, usage
from prophetkv_rag.tools import ToolRun, find_tool_format

if TYPE_CHECKING:
    from prophetkv_rag.generation import GenerationResult, StreamChunk


class ToolCallingLLM(EngineLLM, FunctionCallingLLM):
    """An `EngineLLM` whose chats may show tools; what is structured is held to its schema instead."""

    pydantic_program_mode: PydanticProgramMode = Field(
        default=PydanticProgramMode.LLM,
        description="How structured_predict asks: LLM writes the schema behind the question, FUNCTION calls a tool.",
    )

    _known_tools: Any = PrivateAttr(default=None)

    @property
    def supports_tools(self) -> bool:
        """Whether the model's chat template shows tools, and writes calls in a form that can be read."""
        template = getattr(self.engine.tokenizer, "chat_template", None)
        if self._known_tools is None or self._known_tools[0] != template:
            try:
                find_tool_format(self.engine.tokenizer)
                self._known_tools = (template, True)
            except InputError:
                self._known_tools = (template, False)
        return bool(self._known_tools[1])

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[Any],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `chat`: messages, tools in OpenAI's form, and which must be called."""
        messages = list(chat_history or [])
        if user_msg is not None:
            is_text = isinstance(user_msg, str)
            messages.append(ChatMessage(role=MessageRole.USER, content=user_msg) if is_text else user_msg)
        kwargs.pop("grammar", None)  # a call is held to its tool's schema
        return {
            "messages": messages,
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": tool_choice or ("required" if tool_required else "auto"),
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the calls in a response.

        Raises:
            ValueError: If there is none, and `error_on_no_tool_call`.
        """
        blocks = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not blocks and error_on_no_tool_call:
            reason = (response.raw or {}).get("finish_reason")
            msg = (
                f"the model called no tool (finish reason {reason!r}): require a call (tool_required=True), or raise "
                "max_new_tokens if the reason is 'length'"
            )
            raise ValueError(msg)
        return [
            ToolSelection(tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=block.tool_kwargs)
            for block in blocks
        ]

    def _tool_run(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> ToolRun | None:
        """Return the run of a chat that shows tools, and put its settings into the call's."""
        if not kwargs.get("tools") or kwargs.get("tool_choice") == "none":
            return None
        with refusing():
            run = ToolRun(
                self.engine.tokens,
                self.engine.chunk_index,
                to_template_messages(messages),
                kwargs["tools"],
                kwargs.get("tool_choice"),
                parallel=kwargs.get("parallel_tool_calls") is not False,
            )
        kwargs |= {**run.settings, "query": kwargs.get("query") or run.settings["query"]}
        return run


def tool_response(
    run: ToolRun,
    result: GenerationResult | StreamChunk,
    *,
    delta: str | None = None,
    report: dict[str, Any] | None = None,
) -> ChatResponse:
    """Return an answer as far as it has been read: its words, and the calls that are whole."""
    whole = [(call, call.values) for call in run.calls]
    calls = [
        ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=values)
        for call, values in whole
        if values is not None
    ]
    words = [TextBlock(text=run.text)] if run.text or not calls else []
    message = ChatMessage(role=MessageRole.ASSISTANT, blocks=[*words, *calls])
    given = {**raw(result, report), "finish_reason": run.finish_reason(result)}
    return ChatResponse(message=message, delta=delta, raw=given, additional_kwargs=usage(result))


def tool_responses(run: ToolRun, chunks: Generator[StreamChunk, None, None]) -> Generator[ChatResponse, None, None]:
    """Read a stream step by step; closing this generator stops the generation."""
    with closing(chunks):
        report: dict[str, Any] | None = None  # one for all steps: they differ in text and counts only
        for chunk in chunks:
            report = chunk.report.to_dict() if report is None else report
            delta = run.add(chunk).text
            yield tool_response(run, chunk, delta=delta, report=report)
