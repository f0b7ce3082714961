"""`ProphetKVSynthesizer` makes the prompt that a compact query engine makes, token for token, from nodes alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeWithScore, TextNode

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index import CallRefusedError, ProphetKVLLM, ProphetKVSynthesizer
from prophetkv_rag.prompt.prompt import Prompt
from tests.integrations.rag import QUESTION, TEXTS, CallLog, chunk_key
from tests.tiny import text_of


@pytest.mark.parametrize("has_metadata", [True, False], ids=["metadata", "no_metadata"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_it_is_the_compact_prompt(
    chat: bool,
    has_metadata: bool,
    indexes: Any,
    chat_engine: ProphetKVEngine,
    completion_engine: ProphetKVEngine,
    call_log: CallLog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = chat_engine if chat else completion_engine
    layouts = []
    real = engine._reader.read
    monkeypatch.setattr(engine._reader, "read", lambda *args, **kw: layouts.append(real(*args, **kw)) or layouts[-1])
    llm = ProphetKVLLM(engine=engine, max_new_tokens=8)
    index = indexes[chat, has_metadata]
    found = index.as_query_engine(llm=llm, similarity_top_k=4).query(QUESTION)
    held = ProphetKVSynthesizer(llm).synthesize(QUESTION, found.source_nodes)

    assert layouts[0].input_ids.tolist() == layouts[1].input_ids.tolist()
    assert layouts[0].chunks == layouts[1].chunks
    assert layouts[0].question_rows == layouts[1].question_rows
    assert str(held) == str(found) != ""
    assert held.source_nodes == found.source_nodes
    assert [chunk["status"] for chunk in call_log.calls[1].response.raw["chunks"]] == ["hit"] * 4


def test_streaming_and_async_say_the_same(chat_engine: ProphetKVEngine) -> None:
    llm = ProphetKVLLM(engine=chat_engine, max_new_tokens=8)
    nodes = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in TEXTS]
    plain, stream = ProphetKVSynthesizer(llm), ProphetKVSynthesizer(llm, streaming=True)
    answer = str(plain.synthesize(QUESTION, nodes))

    async def drain() -> str:
        response = await stream.asynthesize(QUESTION, nodes)
        return "".join([token async for token in response.async_response_gen()])

    assert "".join(stream.synthesize(QUESTION, nodes).response_gen) == answer
    assert str(asyncio.run(plain.asynthesize(QUESTION, nodes))) == answer
    assert asyncio.run(drain()) == answer
    assert str(plain.synthesize(QUESTION, [])) == "Empty Response"


def test_every_node_is_a_chunk_even_a_tiny_or_unknown_one(fresh_engine: ProphetKVEngine, call_log: CallLog) -> None:
    texts = ["At ten.", text_of(20), "{braces} and <|im_end|> stay text"]
    nodes = [NodeWithScore(node=TextNode(text=f" {text}\n", metadata={"page": 1})) for text in texts]
    ProphetKVSynthesizer(ProphetKVLLM(engine=fresh_engine, max_new_tokens=2)).synthesize(QUESTION, nodes)
    chunks = call_log.chunks
    assert [chunk["key"] for chunk in chunks] == [chunk_key(fresh_engine, text) for text in texts]
    assert [chunk["status"] for chunk in chunks] == ["miss"] * 3
    assert fresh_engine.store.stats().chunks == 0
    assert "page: 1\n\n At ten.\n\npage: 1\n\n Passage" in call_log.calls[0].prompt


def test_own_template_and_errors(fresh_engine: ProphetKVEngine, call_log: CallLog) -> None:
    llm = ProphetKVLLM(engine=fresh_engine, max_new_tokens=2)
    node = NodeWithScore(node=TextNode(text=text_of(20)))
    template = PromptTemplate("{query_str} Look: {context_str} End.")
    ProphetKVSynthesizer(llm, text_qa_template=template).synthesize(QUESTION, [node])
    assert f"{QUESTION} Look: {text_of(20)} End." in call_log.calls[0].prompt
    with pytest.raises(InputError, match="context_str"):
        ProphetKVSynthesizer(llm, text_qa_template=PromptTemplate("{query_str}")).synthesize(QUESTION, [node])
    with pytest.raises(InputError, match="MockLLM"):
        ProphetKVSynthesizer(MockLLM())
    with pytest.raises(CallRefusedError, match="context window"):
        ProphetKVSynthesizer(llm).synthesize(QUESTION, [NodeWithScore(node=TextNode(text=text_of(4000)))] * 2)


def test_leads_must_match_the_chunks(fresh_engine: ProphetKVEngine) -> None:
    with pytest.raises(InputError, match="1 leads, 2 chunks"):
        fresh_engine.read(Prompt("a", ["b", "c"], "d", leads=["x"]))
    plain = fresh_engine.read(Prompt("a", ["b", "c"], "d"))
    led = fresh_engine.read(Prompt("a", ["b", "c"], "d", leads=["", "x y"]))
    extra = fresh_engine.tokenizer("x y", add_special_tokens=False)["input_ids"]
    at = led.chunks[1].start
    assert led.input_ids[at - len(extra) : at].tolist() == extra
    assert len(led.input_ids) == len(plain.input_ids) + len(extra)
