"""Several prompts of one sync call on a chat model: LangChain's own loop would answer them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables.config import ContextThreadPoolExecutor


def generate_together(
    generate: Callable[..., LLMResult], messages: Sequence[list[BaseMessage]], run_id: UUID | None, *, most: int
) -> LLMResult:
    """Answer each prompt in a thread of its own, and return what one call for all would.

    Args:
        generate: LangChain's, for a list of one prompt.
        messages: The prompts.
        run_id: Of the first one's run.
        most: Most threads.
    """
    run_ids: list[Any] = [run_id, *[None] * (len(messages) - 1)]
    with ContextThreadPoolExecutor(max_workers=min(most, len(messages))) as pool:
        found = list(pool.map(lambda prompt, run_id: generate([prompt], run_id), messages, run_ids))
    runs = [run for result in found for run in result.run or ()]
    whole = LLMResult(generations=[result.generations[0] for result in found], llm_output=found[0].llm_output)
    whole.run = runs or None
    return whole
