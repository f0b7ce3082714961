"""The engine's results as LlamaIndex responses: text and plain numbers, never a tensor."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole

if TYPE_CHECKING:
    from prophetkv_rag.generation import GenerationResult, StreamChunk

Response = TypeVar("Response", CompletionResponse, ChatResponse)


def usage(result: GenerationResult | StreamChunk) -> dict[str, int]:
    """Token counts under the names that LlamaIndex's token counters look for; while streaming, the counts so far."""
    prompt_tokens, completion_tokens = result.report.prompt_tokens, len(result.token_ids)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def raw(result: GenerationResult | StreamChunk, report: dict[str, Any] | None = None) -> dict[str, Any]:
    """`ReuseReport.to_dict()`, the `usage` counts and the `finish_reason`; it survives `json.dumps`.

    `report` is the report as a dictionary, where the caller has it already. LlamaIndex keeps `raw` in responses, events
    and histories: tensors in it would stay alive as long as those do.
    """
    report = result.report.to_dict() if report is None else report
    return {**report, "usage": usage(result), "finish_reason": result.finish_reason}


def to_completion(
    result: GenerationResult | StreamChunk, *, delta: str | None = None, report: dict[str, Any] | None = None
) -> CompletionResponse:
    """Return a finished answer, or one step of a stream with its `delta`, as a completion."""
    return CompletionResponse(text=result.text, delta=delta, raw=raw(result, report), additional_kwargs=usage(result))


def to_chat_response(
    result: GenerationResult | StreamChunk, *, delta: str | None = None, report: dict[str, Any] | None = None
) -> ChatResponse:
    """Return a finished answer, or one step of a stream with its `delta`, as an assistant message."""
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, content=result.text),
        delta=delta,
        raw=raw(result, report),
        additional_kwargs=usage(result),
    )


def responses(
    chunks: Generator[StreamChunk, None, None], to_response: Callable[..., Response]
) -> Generator[Response, None, None]:
    """Convert a stream step by step; closing this generator closes `chunks`, which stops the generation."""
    with closing(chunks):
        report: dict[str, Any] | None = None  # one for all steps: they differ in text and counts only
        for chunk in chunks:
            report = chunk.report.to_dict() if report is None else report
            yield to_response(chunk, delta=chunk.delta, report=report)
