"""An agent on LangGraph whose prompt gets the retrieved texts by a middleware; it remembers the conversation."""

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, dynamic_prompt
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver

from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.integrations.langchain import ChatProphetKV, MiniLMEmbeddings, ProphetKVChroma

texts = [
    "The lighthouse on the island was built in 1862 and still guides ships into the harbour.",
    "The old library stands beside the river; its reading room holds forty thousand books.",
]
model = ChatProphetKV.from_pretrained(fetch_default_model(), max_tokens=60)
retriever = ProphetKVChroma.from_texts(texts, MiniLMEmbeddings(), engine=model.engine).as_retriever()


@dynamic_prompt
def with_context(request: ModelRequest) -> str:
    """Return the system prompt: what is retrieved for the latest message."""
    found = retriever.invoke(request.state["messages"][-1].text)
    return "Answer from the context.\n\n" + "\n\n".join(document.page_content for document in found)


# A model whose chat template shows tools (model.supports_tools) can be given tools=[...] as well.
agent = create_agent(model, tools=[], middleware=[with_context], checkpointer=InMemorySaver())
thread: RunnableConfig = {"configurable": {"thread_id": "1"}}

for question in ("When was the lighthouse built?", "And how many books does the library hold?"):
    answer = agent.invoke({"messages": [{"role": "user", "content": question}]}, thread)["messages"][-1]
    print(f"> {question}\n{answer.text}")
    print(f"{answer.usage_metadata['input_token_details']} of {answer.usage_metadata['input_tokens']} tokens\n")
