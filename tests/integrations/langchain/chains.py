"""Every chain of the table in docs/langchain.md, built from LangChain's own parts, and the six ways to run one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, dynamic_prompt
from langchain_classic.chains import ConversationalRetrievalChain, RetrievalQA, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.chains.history_aware_retriever import create_history_aware_retriever
from langchain_classic.retrievers import ContextualCompressionRetriever, EnsembleRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import create_retriever_tool
from langchain_text_splitters import CharacterTextSplitter

from prophetkv_rag.integrations.langchain import RetrievalMiddleware
from tests.integrations.rag import QUESTION

PROMPT = ChatPromptTemplate.from_messages([("system", "Answer from the context.\n\n{context}"), ("human", "{input}")])
LCEL_PROMPT = ChatPromptTemplate.from_template("Answer from the context:\n{context}\n\nQuestion: {input}")
HISTORY = [HumanMessage("Is there a harbour?"), AIMessage("Yes, it never closes.")]
HISTORY_PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer from the context.\n\n{context}"), ("placeholder", "{chat_history}"), ("human", "{input}")]
)
REPHRASE_PROMPT = ChatPromptTemplate.from_messages(
    [("placeholder", "{chat_history}"), ("human", "{input}"), ("human", "Say it as one question.")]
)


def format_docs(docs: list[Document]) -> str:
    return "\n\n".join(doc.page_content for doc in docs)


def retrieval_chain(model: Any, store: Any) -> Any:
    return create_retrieval_chain(store.as_retriever(), create_stuff_documents_chain(model, PROMPT))


def with_document_prompt(model: Any, store: Any) -> Any:
    header = PromptTemplate.from_template("File: {source}\n{page_content}")
    return create_retrieval_chain(
        store.as_retriever(), create_stuff_documents_chain(model, PROMPT, document_prompt=header)
    )


def lcel(model: Any, store: Any) -> Any:
    context = (lambda x: x["input"]) | store.as_retriever() | format_docs
    return {"context": context, "input": lambda x: x["input"]} | LCEL_PROMPT | model | StrOutputParser()


def lcel_without_format(model: Any, store: Any) -> Any:
    context = (lambda x: x["input"]) | store.as_retriever()
    return {"context": context, "input": lambda x: x["input"]} | LCEL_PROMPT | model | StrOutputParser()


def retrieval_qa(chain_type: str) -> Callable[[Any, Any], Any]:
    def build(model: Any, store: Any) -> Any:
        chain = RetrievalQA.from_chain_type(model, chain_type=chain_type, retriever=store.as_retriever())
        return (lambda x: {"query": x["input"]}) | chain

    return build


def conversational(model: Any, store: Any) -> Any:
    chain = ConversationalRetrievalChain.from_llm(model, store.as_retriever(), rephrase_question=False)
    return (lambda x: {"question": x["input"], "chat_history": HISTORY}) | chain


def history_aware(model: Any, store: Any) -> Any:
    retriever = create_history_aware_retriever(model, store.as_retriever(), REPHRASE_PROMPT)
    chain = create_retrieval_chain(retriever, create_stuff_documents_chain(model, HISTORY_PROMPT))
    return RunnablePassthrough.assign(chat_history=lambda _: HISTORY) | chain


def agent_with_middleware(model: Any, store: Any) -> Any:
    @dynamic_prompt
    def with_context(request: ModelRequest) -> str:
        found = store.similarity_search(request.state["messages"][-1].text, k=4)
        return f"Answer from the context.\n\n{format_docs(found)}"

    return _asked(create_agent(model, tools=[], middleware=[with_context]))


def agent_with_retrieval(model: Any, store: Any) -> Any:
    return _asked(create_agent(model, middleware=[RetrievalMiddleware(store.as_retriever())]))


def agent_with_tool(model: Any, store: Any) -> Any:
    search = create_retriever_tool(store.as_retriever(), "search_town", "Search texts about the town.")
    return _asked(create_agent(model, tools=[search]))


def ensemble(model: Any, store: Any) -> Any:
    mmr = store.as_retriever(search_type="mmr", search_kwargs={"k": 4, "fetch_k": 4})
    retriever = EnsembleRetriever(retrievers=[store.as_retriever(), mmr], weights=[0.5, 0.5])
    return create_retrieval_chain(retriever, create_stuff_documents_chain(model, PROMPT))


def compressed(model: Any, store: Any) -> Any:
    splitter = CharacterTextSplitter(separator=" ", chunk_size=40, chunk_overlap=0)
    cut = ContextualCompressionRetriever(
        base_compressor=DocumentCompressorPipeline(transformers=[splitter]), base_retriever=store.as_retriever()
    )
    return create_retrieval_chain(cut, create_stuff_documents_chain(model, PROMPT))


def _asked(agent: Any) -> Any:
    return (lambda x: {"messages": [HumanMessage(x["input"])]}) | agent


@dataclass(frozen=True)
class Chain:
    """One row of the table: how it is built, how many chunks its calls hold in all, and how many are reused."""

    build: Callable[[Any, Any], Any]
    held: int
    reused: int
    calls: int = 1
    needs_tools: bool = False

    @property
    def verdict(self) -> str:
        """What the table says; four texts are retrieved."""
        return {4: "fully", 0: "not"}.get(self.reused, "partly")


CHAINS = {
    "create_retrieval_chain": Chain(retrieval_chain, 4, 4),
    "create_retrieval_chain, document_prompt with metadata": Chain(with_document_prompt, 4, 4),
    "create_retrieval_chain, EnsembleRetriever and MMR": Chain(ensemble, 4, 4),
    "LCEL with format_docs": Chain(lcel, 4, 4),
    "RetrievalQA stuff": Chain(retrieval_qa("stuff"), 4, 4),
    "RetrievalQA map_reduce": Chain(retrieval_qa("map_reduce"), 4, 4, calls=5),
    "RetrievalQA refine": Chain(retrieval_qa("refine"), 4, 4, calls=4),
    "ConversationalRetrievalChain": Chain(conversational, 4, 4, calls=2),
    "create_history_aware_retriever": Chain(history_aware, 4, 4, calls=2),
    "create_agent, prompt middleware": Chain(agent_with_middleware, 4, 4),
    "create_agent, RetrievalMiddleware": Chain(agent_with_retrieval, 4, 4),
    "create_agent, retriever tool": Chain(agent_with_tool, 4, 4, calls=2, needs_tools=True),
    "ContextualCompressionRetriever (text is cut)": Chain(compressed, 0, 0),
    "LCEL without format_docs": Chain(lcel_without_format, 2, 2),
}

INPUT = {"input": QUESTION}
STYLES = ("invoke", "stream", "ainvoke", "astream", "batch", "abatch")


def run(chain: Any, style: str, config: dict[str, Any]) -> None:
    """Run a chain to its end in one of the six ways; batches have two inputs."""
    if style == "invoke":
        chain.invoke(INPUT, config)
    elif style == "stream":
        list(chain.stream(INPUT, config))
    elif style == "batch":
        chain.batch([INPUT, INPUT], config)
    elif style == "ainvoke":
        asyncio.run(chain.ainvoke(INPUT, config))
    elif style == "abatch":
        asyncio.run(chain.abatch([INPUT, INPUT], config))
    else:

        async def drain() -> None:
            async for _ in chain.astream(INPUT, config):
                pass

        asyncio.run(drain())
