"""Ask about a folder of texts: `python llama_index_rag.py FOLDER "question" ["question" ...]`.

The index and the chunk caches lie in FOLDER/.prophetkv-db and survive: a second run embeds and computes only what has
changed. Answers stream in, with their sources and what was reused.
"""

import argparse
from pathlib import Path

import chromadb
from llama_index.core import Settings, SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.storage.docstore import SimpleDocumentStore

from prophetkv_rag.chroma import open_store
from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.integrations.llama_index import (
    MiniLMEmbedding,
    ProphetKVChromaVectorStore,
    ProphetKVLLM,
    configure,
)

parser = argparse.ArgumentParser(description="Ask a local model about a folder of texts.")
parser.add_argument("folder", type=Path)
parser.add_argument("questions", nargs="+")
parser.add_argument("--model", help="hub name or directory; SmolLM2-135M-Instruct by default")
args = parser.parse_args()

database = args.folder / ".prophetkv-db"
database.mkdir(parents=True, exist_ok=True)
client = chromadb.PersistentClient(str(database))
llm = ProphetKVLLM.from_pretrained(args.model or fetch_default_model(), store=open_store(client), max_new_tokens=128)
configure(llm)  # before anything splits or counts: chunks are measured in this model's tokens

Settings.embed_model = MiniLMEmbedding()
vector_store = ProphetKVChromaVectorStore.from_client(client, "docs", llm.engine)

# The document store remembers what each file held, so that unchanged files cost nothing and deleted ones go.
seen = database / "docstore.json"
docstore = SimpleDocumentStore.from_persist_path(str(seen)) if seen.exists() else SimpleDocumentStore()
pipeline = IngestionPipeline(
    transformations=[Settings.node_parser, Settings.embed_model],
    vector_store=vector_store,
    docstore=docstore,
    docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
)
documents = SimpleDirectoryReader(args.folder, recursive=True, filename_as_id=True).load_data()
changed = pipeline.run(documents=documents)
docstore.persist(str(seen))
print(f"{len(documents)} files; {len(changed)} chunks are new, {llm.engine.store.stats().chunks} are cached")

index = VectorStoreIndex.from_vector_store(vector_store)
query_engine = index.as_query_engine(streaming=True, similarity_top_k=3)
for question in args.questions:
    print(f"\n> {question}")
    response = query_engine.query(question)
    for token in response.response_gen:
        print(token, end="", flush=True)
    print("\n  from", ", ".join(sorted({node.metadata["file_name"] for node in response.source_nodes})))
    print(" ", llm.last_report)
