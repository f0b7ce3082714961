"""LlamaIndex: a language model and a Chroma vector store that reuse the KV caches of retrieved chunks."""

from prophetkv_rag.integrations.llama_index.embedding import MiniLMEmbedding
from prophetkv_rag.integrations.llama_index.llm import ProphetKVLLM
from prophetkv_rag.integrations.llama_index.templates import prompt_template_of
from prophetkv_rag.integrations.llama_index.vector_store import ProphetKVChromaVectorStore

__all__ = ["MiniLMEmbedding", "ProphetKVChromaVectorStore", "ProphetKVLLM", "prompt_template_of"]
