"""LangChain's own suites (langchain-tests), whole: what a local model cannot do is switched off by their properties."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import chromadb
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.langchain import ChatProphetKV, MiniLMEmbeddings, ProphetKVChroma
from tests.integrations.langchain.rag import new_store, town_store
from tests.integrations.rag import TEXTS
from tests.integrations.taught import taught_engine
from tests.tiny import save_tiny_encoder

# Benchmarks of the suites: nothing here depends on how long they take.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


class PlainModel:
    """A model whose chat template shows no tools."""

    max_tokens = 8

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatProphetKV

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self.engine}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """The suite's, with answers no longer than they need be."""
        return {**super().standard_chat_model_params, "max_tokens": self.max_tokens}

    @pytest.fixture(autouse=True)
    def _take_engine(self, chat_engine: ProphetKVEngine) -> None:
        self.engine = chat_engine

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


class ToolModel(PlainModel):
    """A model that was taught to call tools."""

    max_tokens = 120

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": taught_engine()}

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestChatUnit(PlainModel, ChatModelUnitTests):
    pass


class TestChatWithToolsUnit(ToolModel, ChatModelUnitTests):
    pass


class TestChat(PlainModel, ChatModelIntegrationTests):
    @property
    def supported_usage_metadata_details(self) -> dict[Literal["invoke", "stream"], list[Any]]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatProphetKV(engine=self.engine, max_tokens=2)
        self.engine.add_chunks(TEXTS)
        prompt = f"{TEXTS[1]}\n\nWhen does the museum open?"
        message = sum_of(model.stream(prompt)) if stream else model.invoke(prompt)
        assert message.usage_metadata["input_token_details"]["cache_read"] > 0
        return message


class TestChatWithTools(ToolModel, ChatModelIntegrationTests):
    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}


class TestChatWithSchemas(ToolModel, ChatModelIntegrationTests):
    """Structured output held to a schema, with no tool in the prompt."""

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, chat_engine: ProphetKVEngine) -> Iterator[VectorStore]:
        store = ProphetKVChroma(
            f"test-{uuid.uuid4().hex}", self.get_embeddings(), client=chromadb.EphemeralClient(), engine=chat_engine
        )
        yield store
        store.delete_collection()


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _take_engine(self, chat_engine: ProphetKVEngine) -> None:
        self.store = town_store(chat_engine)

    @property
    def retriever_constructor(self) -> Any:
        """A vector store's retriever is made by its store."""
        return lambda k=4: self.store.as_retriever(search_kwargs={"k": k})

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {}

    @property
    def retriever_query_example(self) -> str:
        return "When does the museum open?"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


class TinyEmbeddings:
    @pytest.fixture(autouse=True)
    def _take_encoder(self, encoder: Path) -> None:
        self.encoder = encoder

    @property
    def embeddings_class(self) -> type[MiniLMEmbeddings]:
        return MiniLMEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"path": self.encoder}


class TestEmbeddingsUnit(TinyEmbeddings, EmbeddingsUnitTests):
    pass


class TestEmbeddings(TinyEmbeddings, EmbeddingsIntegrationTests):
    pass


def sum_of(stream: Iterator[Any]) -> Any:
    """All chunks of a stream added up."""
    whole = None
    for chunk in stream:
        whole = chunk if whole is None else whole + chunk
    return whole


def test_the_store_of_the_suite_caches(chat_engine: ProphetKVEngine) -> None:
    assert new_store(chat_engine, TEXTS)._collection.engine is chat_engine
    assert len(chat_engine.chunk_index) >= len(TEXTS)
