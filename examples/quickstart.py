"""Index two texts into Chroma and ask about them, through LlamaIndex's own index and query engine."""

import chromadb
from llama_index.core import Document, StorageContext, VectorStoreIndex

from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.integrations.llama_index import MiniLMEmbedding, ProphetKVChromaVectorStore, ProphetKVLLM

texts = [
    "The lighthouse on the island was built in 1862 and still guides ships into the harbour.",
    "The old library stands beside the river; its reading room holds forty thousand books.",
]
llm = ProphetKVLLM.from_pretrained(fetch_default_model())  # or the hub name of any model with RoPE
vector_store = ProphetKVChromaVectorStore.from_client(chromadb.EphemeralClient(), "texts", llm.engine)
storage = StorageContext.from_defaults(vector_store=vector_store)
documents = [Document(text=text) for text in texts]
index = VectorStoreIndex.from_documents(documents, storage_context=storage, embed_model=MiniLMEmbedding())

print(index.as_query_engine(llm=llm).query("How many books does the library hold?"))
print(llm.last_report)
