"""The names users type; whoever changes them changes this test, on purpose."""

from __future__ import annotations

import importlib

import pytest

PUBLIC = {
    "prophetkv_rag": [
        "ContextWindowError",
        "DeadlineError",
        "GenerationResult",
        "Grammar",
        "InputError",
        "PrefillResult",
        "Prompt",
        "ProphetKVConfig",
        "ProphetKVEngine",
        "ProphetKVError",
        "ReuseReport",
        "StoreError",
        "StreamChunk",
        "UnknownModelError",
        "UnsupportedModelError",
    ],
    "prophetkv_rag.chroma": [
        "KVCachingCollection",
        "Record",
        "default_blob_directory",
        "in_documents",
        "live_references",
        "open_store",
    ],
    "prophetkv_rag.defaults": [
        "DemoQuestion",
        "MiniLMEmbedder",
        "cache_directory",
        "fetch_default_gguf",
        "fetch_default_model",
        "fetch_embedding_model",
        "read_questions",
        "read_source",
        "read_speeches",
        "speeches_directory",
    ],
    "prophetkv_rag.distributed": [
        "BuildReport",
        "ChunkWorker",
        "Cluster",
        "Documents",
        "Totals",
        "WorkerPool",
        "WorkerSettings",
        "build_caches",
        "check_address",
        "connect",
        "encode_documents",
        "left_for_workers",
    ],
    "prophetkv_rag.integrations.langchain": [
        "ChatProphetKV",
        "MiniLMEmbeddings",
        "ProphetKVChroma",
        "ProphetKVLLM",
        "RetrievalMiddleware",
        "with_kv_caches",
    ],
    "prophetkv_rag.integrations.llama_index": [
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
    ],
    "prophetkv_rag.integrations.vllm": ["ConnectorSettings", "ProphetKVConnector", "VLLMEngine", "probe_in_vllm"],
    "prophetkv_rag.reuse": [
        "Assembly",
        "LayerView",
        "PrefillResult",
        "Prefiller",
        "QueryContext",
        "RowsJob",
        "Selection",
        "Strategy",
        "ask_together",
        "assemble_caches",
        "available_strategies",
        "make_strategy",
        "ratio_by_encoding",
        "recompute_rows",
        "register_strategy",
        "rows_job",
        "token_budget",
        "top_positions",
    ],
    "prophetkv_rag.server": ["ServerSettings", "create_app"],
    "prophetkv_rag.reuse.selection": [
        "QueryContext",
        "Selection",
        "Strategy",
        "available_strategies",
        "make_strategy",
        "register_strategy",
    ],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_all_is_what_it_was(module: str) -> None:
    _needs_vllm(module)
    assert sorted(importlib.import_module(module).__all__) == PUBLIC[module]


@pytest.mark.parametrize("module", PUBLIC)
def test_every_name_resolves(module: str) -> None:
    _needs_vllm(module)
    loaded = importlib.import_module(module)
    for name in loaded.__all__:
        assert getattr(loaded, name).__name__ == name or callable(getattr(loaded, name))
        assert name in dir(loaded)


def _needs_vllm(module: str) -> None:
    if module.endswith(".vllm"):
        pytest.importorskip("vllm", reason="needs vLLM's own environment: make test-vllm")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Prophet'"):
        getattr(importlib.import_module("prophetkv_rag"), "Prophet")  # noqa: B009
