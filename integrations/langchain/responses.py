"""The engine's figures in LangChain's words: plain numbers, never a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

if TYPE_CHECKING:
    from prophetkv_rag.generation import GenerationResult, StreamChunk


_SHARED_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_call"}
"""An answer that was cancelled, or late, ended for another reason."""


def usage(chunk: StreamChunk | GenerationResult) -> UsageMetadata:
    """Token counts of a finished answer.

    `input_token_details["cache_read"]` (LangChain's name) counts tokens taken as they are from chunk caches and from
    former turns of the conversation, `["remembered"]` the latter alone, `["recomputed"]` those that ran through the
    model again; the rest of the input is new.
    """
    report, output = chunk.report, len(chunk.token_ids)
    details: Any = {
        "cache_read": report.remembered_tokens + report.reused_tokens,
        "remembered": report.remembered_tokens,
        "recomputed": report.recomputed_tokens,
    }
    return UsageMetadata(
        input_tokens=report.prompt_tokens,
        output_tokens=output,
        total_tokens=report.prompt_tokens + output,
        input_token_details=InputTokenDetails(**details),
    )


def metadata(
    chunk: StreamChunk | GenerationResult, model_name: str, finish_reason: str | None = None
) -> dict[str, Any]:
    """`response_metadata` of a finished answer; the whole reuse report is in `["prophetkv"]`.

    `["normalized_finish_reason"]` is the same in the words that all providers share (langchain-core 1.8.4).
    """
    reason = finish_reason or chunk.finish_reason
    return {
        "model_name": model_name,
        "model_provider": "prophetkv",
        "finish_reason": reason,
        "normalized_finish_reason": _SHARED_REASONS.get(reason or "", "other"),
        "prophetkv": chunk.report.to_dict(),
    }
