"""The chat as an agent: the model itself searches the documents, when it wants to and for what it wants to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from llama_index.core.agent.workflow import AgentStream, FunctionAgent, ToolCall, ToolCallResult
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context

AGENT_PROMPT = "You answer questions about the user's documents, briefly. Search them first: you know nothing else."
MOST_SEARCHES = 3

Step = tuple[str, Any]
"""("call", (tool, arguments)), ("found", nodes) or ("token", text)."""


def agent_steps(llm: Any, retriever: Any, memory: Any, question: str) -> Iterator[Step]:
    """Run LlamaIndex's `FunctionAgent` on a loop of its own, step by step; closing the iterator stops it."""
    loop = asyncio.new_event_loop()
    steps = _steps(llm, retriever, memory, question)
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(steps))
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(steps.aclose())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _steps(llm: Any, retriever: Any, memory: Any, question: str) -> AsyncIterator[Step]:
    found: list[Any] = []
    searched: set[str] = set()

    async def search_documents(query: str) -> str:
        """Search the user's documents."""
        if query in searched or len(searched) >= MOST_SEARCHES:
            agent.tools = []  # small models go round in circles: now an answer is all that is left
            return "No more searches. Answer from what was found."
        searched.add(query)
        nodes = await retriever.aretrieve(query)
        found.extend(node for node in nodes if node.node_id not in {one.node_id for one in found})
        return "\n\n".join(node.get_content() for node in nodes)  # each is recognised, and its cache is reused

    agent = FunctionAgent(
        tools=[FunctionTool.from_defaults(async_fn=search_documents)],
        llm=llm,
        system_prompt=AGENT_PROMPT,
        allow_parallel_tool_calls=False,
    )
    handler = agent.run(question, ctx=Context(agent), memory=memory)
    try:
        async for event in handler.stream_events():
            if isinstance(event, ToolCallResult):
                yield "found", list(found)
            elif isinstance(event, ToolCall):
                yield "call", (event.tool_name, event.tool_kwargs)
            elif isinstance(event, AgentStream) and event.delta:
                yield "token", event.delta
        await handler
    finally:
        if not handler.done():
            await handler.cancel_run()
