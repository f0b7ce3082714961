"""Index two texts into Chroma and ask about them, through LangChain's own retrieval chain."""

from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.prompts import ChatPromptTemplate

from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.integrations.langchain import ChatProphetKV, MiniLMEmbeddings, ProphetKVChroma

texts = [
    "The lighthouse on the island was built in 1862 and still guides ships into the harbour.",
    "The old library stands beside the river; its reading room holds forty thousand books.",
]
model = ChatProphetKV.from_pretrained(fetch_default_model())  # or the hub name of any chat model with RoPE
store = ProphetKVChroma.from_texts(texts, MiniLMEmbeddings(), engine=model.engine)
prompt = ChatPromptTemplate.from_messages([("system", "Answer from the context.\n\n{context}"), ("human", "{input}")])
chain = create_retrieval_chain(store.as_retriever(), create_stuff_documents_chain(model, prompt))

print(chain.invoke({"input": "How many books does the library hold?"})["answer"])
print(model.last_report)
