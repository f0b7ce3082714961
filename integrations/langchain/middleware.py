"""Retrieval for agents: a `create_agent` middleware that puts retrieved documents into the system message."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.retrievers import BaseRetriever

from prophetkv_rag.errors import InputError
from prophetkv_rag.extras import needs

with needs("agents", "langchain", what="RetrievalMiddleware"):
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse

INSTRUCTION = "Answer from the context."


class RetrievalMiddleware(AgentMiddleware[Any, Any]):
    """Shows an agent's model what is retrieved for the user's latest message, in every call, text as it is stored.

    So the texts' caches are reused, also in the calls after a tool's answer. The agent's own system prompt stays in
    front. Nothing retrieved is kept in the conversation.

    Example:
        ```python
        agent = create_agent(model, tools=[...], middleware=[RetrievalMiddleware(store.as_retriever())])
        ```
    """

    def __init__(self, retriever: BaseRetriever, *, instruction: str = INSTRUCTION) -> None:
        """Make a middleware.

        Args:
            retriever: Finds documents; those of a `ProphetKVChroma` have caches.
            instruction: Stands in front of them.

        Raises:
            InputError: If `retriever` is none.
        """
        super().__init__()
        if not isinstance(retriever, BaseRetriever):
            msg = f"retriever is a {type(retriever).__name__}; give a LangChain retriever, such as store.as_retriever()"
            raise InputError(msg)
        self.retriever = retriever
        self.instruction = instruction

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Retrieve, then call the model."""
        question = latest_question(request.messages)
        return handler(self._shown(request, self.retriever.invoke(question) if question else ()))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Async twin of `wrap_model_call`."""
        question = latest_question(request.messages)
        return await handler(self._shown(request, await self.retriever.ainvoke(question) if question else ()))

    def _shown(self, request: ModelRequest[Any], found: Sequence[Document]) -> ModelRequest[Any]:
        if not found:
            return request
        own = request.system_message.text if request.system_message else ""
        texts = [text for text in (own, self.instruction) if text] + [document.page_content for document in found]
        return request.override(system_message=SystemMessage("\n\n".join(texts)))


def latest_question(messages: Sequence[Any]) -> str:
    """Return the text of the user's latest message; nothing if there is none."""
    return next((str(message.text) for message in reversed(messages) if isinstance(message, HumanMessage)), "")
