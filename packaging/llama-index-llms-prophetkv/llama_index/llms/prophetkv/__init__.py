"""A LlamaIndex model that reuses the KV caches of retrieved chunks: `prophetkv_rag.integrations.llama_index`."""

from prophetkv_rag.integrations.llama_index import (
    AlteredTextCache,
    CallRefusedError,
    MiniLMEmbedding,
    ProphetKVChromaVectorStore,
    ProphetKVLLM,
    ProphetKVSynthesizer,
    ReuseReportEvent,
    configure,
    prompt_template_of,
    with_kv_caches,
)

__all__ = [
    "AlteredTextCache",
    "CallRefusedError",
    "MiniLMEmbedding",
    "ProphetKVChromaVectorStore",
    "ProphetKVLLM",
    "ProphetKVSynthesizer",
    "ReuseReportEvent",
    "configure",
    "prompt_template_of",
    "with_kv_caches",
]
