"""The embedder on a tiny random encoder: pooling, batching, order; and the LlamaIndex adapter on top of it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from prophetkv_rag.defaults.embedding import MiniLMEmbedder
from prophetkv_rag.defaults.wheel_fetch import cache_directory, is_complete
from prophetkv_rag.integrations.llama_index.embedding import MiniLMEmbedding
from tests.tiny import save_tiny_encoder

TEXTS = ["a much longer text about planes, tanks and ships in 1942", "short", "x", "short", "of middling length"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def test_vectors_have_length_one_and_the_texts_order(encoder: Path) -> None:
    vectors = torch.tensor(MiniLMEmbedder(encoder, batch_size=2).embed(TEXTS))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(vectors[1], vectors[3])
    assert not torch.allclose(vectors[0], vectors[4])


def test_batching_does_not_change_a_vector(encoder: Path) -> None:
    alone = [MiniLMEmbedder(encoder).embed([text])[0] for text in TEXTS]
    torch.testing.assert_close(torch.tensor(MiniLMEmbedder(encoder).embed(TEXTS)), torch.tensor(alone))


def test_pooling_is_the_mean_over_the_tokens(encoder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(encoder)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        mean = AutoModel.from_pretrained(encoder).eval()(**inputs).last_hidden_state[0].mean(dim=0)
    torch.testing.assert_close(torch.tensor(MiniLMEmbedder(encoder).embed(TEXTS[:1])[0]), mean / mean.norm())


def test_nothing_is_loaded_before_the_first_text() -> None:
    embedder = MiniLMEmbedder("no/such/model")
    assert embedder.embed([]) == []
    with pytest.raises(OSError, match="no/such/model"):
        embedder.embed(["text"])


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        MiniLMEmbedder(batch_size=0)


async def test_the_adapter_gives_the_same_vectors_in_every_way(encoder: Path) -> None:
    adapter, expected = MiniLMEmbedding(encoder), MiniLMEmbedder(encoder).embed(TEXTS[:2])
    assert adapter.get_text_embedding(TEXTS[0]) == pytest.approx(expected[0], abs=1e-6)
    assert await adapter.aget_query_embedding(TEXTS[1]) == pytest.approx(expected[1], abs=1e-6)
    for vectors in (adapter.get_text_embedding_batch(TEXTS[:2]), await adapter.aget_text_embedding_batch(TEXTS[:2])):
        torch.testing.assert_close(torch.tensor(vectors), torch.tensor(expected))


async def test_async_embedding_does_not_block_the_event_loop(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, has_turned = asyncio.get_running_loop(), threading.Event()

    def embed(self: MiniLMEmbedder, texts: list[str]) -> list[list[float]]:
        loop.call_soon_threadsafe(has_turned.set)
        assert has_turned.wait(300), "the loop is blocked"
        return [[1.0] for _ in texts]

    monkeypatch.setattr(MiniLMEmbedder, "embed", embed)
    assert await MiniLMEmbedding(encoder).aget_query_embedding("text") == [1.0]


@pytest.mark.model
def test_minilm_ranks_meanings() -> None:
    path = cache_directory() / "models" / "all-MiniLM-L6-v2"
    if not is_complete(path):
        pytest.skip("not fetched: make model")
    question, near, far = torch.tensor(
        MiniLMEmbedder(path).embed(["How many planes?", "Aircraft production numbers.", "A recipe for bread."])
    )
    assert question.shape == (384,)
    assert question @ near > 0.4 > question @ far + 0.1
