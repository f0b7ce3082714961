"""The chat engines, agents and chains that `ten_turns.py` runs, each as its framework has it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import uvicorn
from langchain.agents import create_agent
from langchain_classic.chains import ConversationalRetrievalChain, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.chat_engine import CondensePlusContextChatEngine, CondenseQuestionChatEngine, ContextChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool
from llama_index.core.workflow import Context
from openai import OpenAI
from ten_turns_setting import Ask, FirstOf, InOrder, Setting

from prophetkv_rag.integrations.langchain import ChatProphetKV, RetrievalMiddleware
from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from prophetkv_rag.server import ServerSettings, create_app


def _memory() -> ChatMemoryBuffer:
    return ChatMemoryBuffer.from_defaults(token_limit=6000)


def _chat_engine(kind: Any, *, is_fixed: bool = False) -> Callable[[Setting], AbstractContextManager[Ask]]:
    @contextmanager
    def way(setting: Setting) -> Iterator[Ask]:
        index = setting.index
        k = len(setting.passages) if is_fixed else setting.k
        options: dict[str, Any] = {"llm": setting.llm(), "memory": _memory()}
        if kind is CondenseQuestionChatEngine:
            query_engine = index.as_query_engine(llm=setting.llm(), similarity_top_k=k)
            yield kind.from_defaults(query_engine=query_engine, **options).chat
            return
        if is_fixed:  # everything is found, and the first half of it in one order stays
            options["node_postprocessors"] = [InOrder(), FirstOf(count=setting.k)]
        yield kind.from_defaults(retriever=index.as_retriever(similarity_top_k=k), **options).chat

    return way


def _llama_index_agent(kind: str) -> Callable[[Setting], AbstractContextManager[Ask]]:
    @contextmanager
    def way(setting: Setting) -> Iterator[Ask]:
        find = setting.searches()

        def search(query: str, count: int) -> str:
            """Search the speeches."""
            return find(count)

        engine = setting.engine if kind == "ReActAgent" else setting.tool_engine
        llm = ProphetKVLLM(engine=engine, max_new_tokens=setting.answer_tokens)
        tools = [FunctionTool.from_defaults(search)]
        if kind == "ReActAgent":
            agent: Any = ReActAgent(tools=tools, llm=llm)
            plan = setting.plan(
                lambda query, count: (
                    "Thought: I need to look this up.\nAction: search\nAction Input: "
                    + json.dumps({"query": query, "count": count})
                ),
                lambda words: f"Thought: I can answer without using any more tools.\nAnswer: {words}",
                engine,
            )
        else:
            agent = FunctionAgent(tools=tools, llm=llm)
            if kind == "AgentWorkflow":
                agent = AgentWorkflow(agents=[agent], root_agent=agent.name)
            plan = setting.plan(_call, str, engine)
        with asyncio.Runner() as runner:
            context = Context(agent)
            memory = _memory()

            async def talk(question: str) -> None:
                await agent.run(question, ctx=context, memory=memory)

            def ask(question: str) -> None:
                plan()
                runner.run(talk(question))

            yield ask

    return way


def _call(query: str, count: int) -> str:
    arguments = json.dumps({"query": query, "count": count})
    return f'<tool_call>\n{{"name": "search", "arguments": {arguments}}}\n</tool_call>'


@contextmanager
def _message_history(setting: Setting) -> Iterator[Ask]:
    """The context comes with the first question."""
    prompt = ChatPromptTemplate.from_messages([("placeholder", "{history}"), ("human", "{input}")])
    history = InMemoryChatMessageHistory()
    chain = RunnableWithMessageHistory(
        prompt | setting.chat_model(),
        lambda _: history,
        input_messages_key="input",
        history_messages_key="history",
    )

    def ask(question: str) -> None:
        text = question if history.messages else f"Context:\n\n{setting.context}\n\n{question}"
        chain.invoke({"input": text}, {"configurable": {"session_id": "1"}})

    yield ask


@contextmanager
def _retrieval_chain(setting: Setting) -> Iterator[Ask]:
    """What is retrieved stands in the system message, before the history."""
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer from the context.\n\n{context}"), ("placeholder", "{history}"), ("human", "{input}")]
    )
    history = InMemoryChatMessageHistory()
    retriever = setting.store.as_retriever(search_kwargs={"k": setting.k})
    chain = RunnableWithMessageHistory(
        create_retrieval_chain(retriever, create_stuff_documents_chain(setting.chat_model(), prompt)),
        lambda _: history,
        input_messages_key="input",
        history_messages_key="history",
        output_messages_key="answer",
    )
    yield lambda question: chain.invoke({"input": question}, {"configurable": {"session_id": "1"}})


@contextmanager
def _terminal_chat(setting: Setting) -> Iterator[Ask]:
    """As examples/chatbot_langchain: the history, then what is retrieved, with the question."""
    human = "Context:\n\n{context}\n\nAnswer from the context, in one sentence: {question}"
    prompt = ChatPromptTemplate.from_messages([("placeholder", "{history}"), ("human", human)])
    chain, history = prompt | setting.chat_model(), list[Any]()

    def ask(question: str) -> None:
        context = "\n\n".join(found.page_content for found in setting.store.similarity_search(question, k=setting.k))
        answer = chain.invoke({"context": context, "history": history, "question": question})
        history.extend([HumanMessage(question), AIMessage(answer.text)])

    yield ask


@contextmanager
def _conversational_chain(setting: Setting) -> Iterator[Ask]:
    chain = ConversationalRetrievalChain.from_llm(
        setting.chat_model(), setting.store.as_retriever(search_kwargs={"k": setting.k})
    )
    history = list[tuple[str, str]]()

    def ask(question: str) -> None:
        answer = chain.invoke({"question": question, "chat_history": history})
        history.append((question, answer["answer"]))

    yield ask


@contextmanager
def _retrieval_agent(setting: Setting) -> Iterator[Ask]:
    retriever = setting.store.as_retriever(search_kwargs={"k": setting.k})
    agent = create_agent(
        setting.chat_model(), middleware=[RetrievalMiddleware(retriever)], checkpointer=InMemorySaver()
    )
    yield lambda question: agent.invoke({"messages": [("user", question)]}, {"configurable": {"thread_id": "1"}})


@contextmanager
def _tool_agent(setting: Setting) -> Iterator[Ask]:
    find = setting.searches()

    @tool
    def search(query: str, count: int) -> str:
        """Search the speeches."""
        return find(count)

    model = ChatProphetKV(engine=setting.tool_engine, max_tokens=setting.answer_tokens)
    agent = create_agent(model, tools=[search], checkpointer=InMemorySaver())
    plan = setting.plan(_call, str, setting.tool_engine)

    def ask(question: str) -> None:
        plan()
        agent.invoke({"messages": [("user", question)]}, {"configurable": {"thread_id": "1"}})

    yield ask


@contextmanager
def _server(setting: Setting) -> Iterator[Ask]:
    """The context comes with the first question, as a stream."""
    app = create_app(setting.engine, ServerSettings(model_name="model"))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    history = list[Any]()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:

            def ask(question: str) -> None:
                text = question if history else f"Context:\n\n{setting.context}\n\n{question}"
                history.append({"role": "user", "content": text})
                pieces = client.chat.completions.create(
                    model="model", messages=history, max_tokens=setting.answer_tokens, stream=True
                )
                said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
                history.append({"role": "assistant", "content": said})

            yield ask
    finally:
        server.should_exit = True
        thread.join()


WAYS: dict[str, Callable[[Setting], AbstractContextManager[Ask]]] = {
    "LlamaIndex `ContextChatEngine`": _chat_engine(ContextChatEngine),
    "LlamaIndex `ContextChatEngine`, one context": _chat_engine(ContextChatEngine, is_fixed=True),
    "LlamaIndex `CondensePlusContextChatEngine`": _chat_engine(CondensePlusContextChatEngine),
    "LlamaIndex `CondenseQuestionChatEngine`": _chat_engine(CondenseQuestionChatEngine),
    "LlamaIndex `ReActAgent`": _llama_index_agent("ReActAgent"),
    "LlamaIndex `FunctionAgent`": _llama_index_agent("FunctionAgent"),
    "LlamaIndex `AgentWorkflow`": _llama_index_agent("AgentWorkflow"),
    "LangChain `RunnableWithMessageHistory`, one context": _message_history,
    "LangChain `RunnableWithMessageHistory`, `create_retrieval_chain`": _retrieval_chain,
    "LangChain, the history before the context (examples/chatbot_langchain)": _terminal_chat,
    "LangChain `ConversationalRetrievalChain`": _conversational_chain,
    "LangChain `create_agent`, `RetrievalMiddleware`": _retrieval_agent,
    "LangChain `create_agent`, a tool": _tool_agent,
    "server, OpenAI's client, one context": _server,
}
