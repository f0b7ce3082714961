"""An agent on LangGraph whose prompt gets the retrieved texts by a middleware; it remembers the conversation."""

from langchain.agents import create_agent
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver

from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.integrations.langchain import ChatProphetKV, MiniLMEmbeddings, ProphetKVChroma, RetrievalMiddleware

texts = [
    "The lighthouse on the island was built in 1862 and still guides ships into the harbour.",
    "The old library stands beside the river; its reading room holds forty thousand books.",
]
model = ChatProphetKV.from_pretrained(fetch_default_model(), max_tokens=60)
retriever = ProphetKVChroma.from_texts(texts, MiniLMEmbeddings(), engine=model.engine).as_retriever()

# A model whose chat template shows tools (model.supports_tools) can be given tools=[...] as well.
agent = create_agent(model, middleware=[RetrievalMiddleware(retriever)], checkpointer=InMemorySaver())
thread: RunnableConfig = {"configurable": {"thread_id": "1"}}

for question in ("When was the lighthouse built?", "And how many books does the library hold?"):
    answer = agent.invoke({"messages": [{"role": "user", "content": question}]}, thread)["messages"][-1]
    print(f"> {question}\n{answer.text}")
    print(f"{answer.usage_metadata['input_token_details']} of {answer.usage_metadata['input_tokens']} tokens\n")
