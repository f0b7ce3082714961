"""`configure(llm)`: LlamaIndex then counts with the model's own tokenizer, and what it packs fits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import llama_index.core
import pytest
from llama_index.core import Settings, get_response_synthesizer
from llama_index.core.node_parser import MarkdownNodeParser, SentenceSplitter, TokenTextSplitter
from llama_index.core.schema import Document, NodeWithScore, TextNode

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import ContextWindowError, InputError
from prophetkv_rag.integrations.llama_index import CallRefusedError, ProphetKVLLM, configure
from tests.integrations.rag import QUESTION
from tests.integrations.scripted import ScriptedLLM

FIELDS = ("_llm", "_node_parser", "_prompt_helper", "_chat_prompt_helper", "_transformations")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Gives every test untouched global settings, and puts them back."""
    kept = {name: getattr(Settings, name) for name in FIELDS}
    tokenizer = llama_index.core.global_tokenizer
    for name in FIELDS:
        setattr(Settings, name, None)
    llama_index.core.global_tokenizer = None
    yield
    for name, value in kept.items():
        setattr(Settings, name, value)
    llama_index.core.global_tokenizer = tokenizer


def dense(num_words: int, seed: int = 0) -> str:
    """Long words that an OpenAI tokenizer knows and the tiny one spells out, in several tokens each."""
    words = ("international", "development", "government", "university", "information")
    return " ".join(words[(i + seed) % len(words)] for i in range(num_words))


def ask(llm: ProphetKVLLM, texts: list[str], mode: str = "compact") -> Any:
    nodes = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in texts]
    return get_response_synthesizer(llm=llm, response_mode=mode).synthesize(QUESTION, nodes)


@pytest.mark.parametrize("mode", ["compact", "tree_summarize"])
def test_without_it_a_prompt_passes_the_check_and_is_refused(mode: str, chat_engine: ProphetKVEngine) -> None:
    """And says so: `compact` would turn a ValueError into the answer "Empty Response"."""
    with pytest.raises(CallRefusedError, match="the prompt has") as caught:
        ask(ProphetKVLLM(engine=chat_engine, max_new_tokens=8), [dense(400, seed) for seed in range(6)], mode)
    assert isinstance(caught.value.__cause__, ContextWindowError)


@pytest.mark.parametrize("style", ["complete", "stream_complete", "acomplete"])
def test_bad_settings_are_refused_too(style: str, chat_engine: ProphetKVEngine) -> None:
    llm = ProphetKVLLM(engine=chat_engine, strategy="nonsense")
    calls = {
        "complete": lambda: llm.complete("Hi"),
        "stream_complete": lambda: list(llm.stream_complete("Hi")),
        "acomplete": lambda: asyncio.run(llm.acomplete("Hi")),
    }
    with pytest.raises(CallRefusedError, match="nonsense"):
        calls[style]()


@pytest.mark.parametrize("mode", ["compact", "compact_accumulate", "simple_summarize"])
@pytest.mark.parametrize("max_new_tokens", [1, 64])
def test_with_it_every_prompt_fits(mode: str, max_new_tokens: int, chat_engine: ProphetKVEngine, call_log: Any) -> None:
    llm = ScriptedLLM(engine=chat_engine, max_new_tokens=max_new_tokens, context_window=1300)
    configure(llm)
    chat_engine.add_chunks([dense(30, seed) for seed in range(3)])
    for num_words in (40, 53):  # other remainders at the window's edge
        call_log.calls.clear()
        ask(llm, [dense(num_words, seed) for seed in range(5)], mode)
        sizes = [call.response.raw["prompt_tokens"] for call in call_log.calls]
        assert max(sizes) + max_new_tokens <= 1300
        assert max(sizes) > 700 or mode == "simple_summarize", "the window is used"


def test_it_sets_what_it_says(chat_engine: ProphetKVEngine) -> None:
    llm = ProphetKVLLM(engine=chat_engine)
    steps = Settings.transformations
    assert isinstance(steps[0], SentenceSplitter)
    configure(llm)
    assert Settings.llm is llm
    assert Settings.tokenizer("60,000 planes") == chat_engine.library.tokens.chunk("60,000 planes")
    assert Settings.chunk_size == 256
    assert Settings.transformations == [Settings.node_parser]
    nodes = Settings.node_parser.get_nodes_from_documents([Document(text=dense(500))])
    sizes = [len(chat_engine.tokenizer(node.text)["input_ids"]) for node in nodes]
    assert 150 < max(sizes) <= 256
    configure(llm, chunk_size=100, chunk_overlap=10)
    assert (Settings.chunk_size, Settings.chunk_overlap) == (100, 10)
    configure(ProphetKVLLM(engine=chat_engine, context_window=600))
    assert 16 <= Settings.chunk_size < 75


def test_own_node_parsers_keep_their_kind(chat_engine: ProphetKVEngine) -> None:
    llm = ProphetKVLLM(engine=chat_engine)
    Settings.node_parser = markdown = MarkdownNodeParser()
    configure(llm)
    assert Settings.node_parser is markdown
    Settings.node_parser = splitter = TokenTextSplitter(chunk_size=300)
    configure(llm, chunk_size=123)
    assert Settings.node_parser is splitter
    assert splitter.chunk_size == 123


@pytest.mark.parametrize("wrong", [{"chunk_size": 0}, {"chunk_size": 10**6}, {"chunk_size": 64, "chunk_overlap": 64}])
def test_bad_sizes_change_nothing(wrong: dict[str, int], chat_engine: ProphetKVEngine) -> None:
    with pytest.raises(InputError, match="must be from"):
        configure(ProphetKVLLM(engine=chat_engine), **wrong)
    assert Settings._llm is None


def test_making_a_model_sets_nothing(chat_engine: ProphetKVEngine) -> None:
    ProphetKVLLM(engine=chat_engine)
    assert Settings._llm is None
    assert llama_index.core.global_tokenizer is None
