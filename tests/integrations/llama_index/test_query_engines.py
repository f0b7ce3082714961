"""Unmodified query and chat engines reuse every retrieved chunk, whatever the response mode, and say what they did."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.indices.vector_store import VectorStoreIndex
from llama_index.core.instrumentation.dispatcher import instrument_tags
from llama_index.core.llms import LLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.types import BaseOutputParser

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from tests.integrations.rag import QUESTION, TEXTS, CallLog, build_index, chunk_key

MODES = ("compact", "refine", "tree_summarize", "simple_summarize", "accumulate", "compact_accumulate")
STYLES = ("query", "stream", "aquery", "astream")
COMBINATIONS = [
    (mode, style)
    for mode in MODES
    for style in STYLES
    if not ("accumulate" in mode and "stream" in style)  # LlamaIndex: "Unable to stream in Accumulate response mode"
]
CALLS = {"refine": 4, "accumulate": 4}


def ask(query_engine: Any, style: str, question: str = QUESTION) -> str:
    """Ask in one of the four styles; returns the answer's text."""

    async def drain() -> str:
        response = await query_engine.aquery(question)
        return "".join([token async for token in response.async_response_gen()])

    if style == "query":
        return str(query_engine.query(question))
    if style == "stream":
        return "".join(query_engine.query(question).response_gen)
    if style == "aquery":
        return str(asyncio.run(query_engine.aquery(question)))
    return asyncio.run(drain())


def plain_prompt(call: Any) -> Any:
    """The prompt of a logged call as the engine takes it, made without the integration's code."""
    if hasattr(call, "messages"):
        return [{"role": message.role.value, "content": message.content} for message in call.messages]
    return call.prompt


@pytest.mark.parametrize("has_metadata", [True, False], ids=["metadata", "no_metadata"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
@pytest.mark.parametrize(("mode", "style"), COMBINATIONS)
def test_every_mode_reuses_every_retrieved_chunk(
    mode: str,
    style: str,
    chat: bool,
    has_metadata: bool,
    indexes: dict[tuple[bool, bool], VectorStoreIndex],
    chat_engine: ProphetKVEngine,
    completion_engine: ProphetKVEngine,
    call_log: CallLog,
) -> None:
    engine = chat_engine if chat else completion_engine
    llm = ProphetKVLLM(engine=engine, max_new_tokens=8)
    query_engine = indexes[chat, has_metadata].as_query_engine(
        llm=llm, similarity_top_k=4, response_mode=mode, streaming="stream" in style
    )
    answer = ask(query_engine, style)

    assert len(call_log.calls) == CALLS.get(mode, 1)
    assert [chunk["status"] for chunk in call_log.chunks] == ["hit"] * 4
    assert {chunk["key"] for chunk in call_log.chunks} == {chunk_key(engine, text) for text in TEXTS}
    for call in call_log.calls:
        response = call.response
        text = response.message.content if chat else response.text
        direct = engine.generate(plain_prompt(call), max_new_tokens=8, query=QUESTION)
        assert text == direct.text
        assert json.loads(json.dumps(response.raw)) == response.raw
        without_times = {k: v for k, v in direct.report.to_dict().items() if k != "timings_s"}
        assert without_times.items() <= response.raw.items()
        assert response.additional_kwargs == {
            "prompt_tokens": direct.report.prompt_tokens,
            "completion_tokens": len(direct.token_ids),
            "total_tokens": direct.report.prompt_tokens + len(direct.token_ids),
        }
        assert text in answer or (mode == "refine" and call is not call_log.calls[-1])
    assert llm.last_report is not None
    last_calls = call_log.calls if mode == "accumulate" else call_log.calls[-1:]  # accumulate's calls run at once
    assert any(llm.last_report.to_dict().items() <= call.response.raw.items() for call in last_calls)


@pytest.mark.parametrize(("mode", "style"), COMBINATIONS)
def test_the_engine_is_told_the_question(
    mode: str,
    style: str,
    indexes: dict[tuple[bool, bool], VectorStoreIndex],
    llm: ProphetKVLLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries = []
    real = llm.engine._reader.read

    def spy(prompt: Any, *, query: str | None) -> Any:
        queries.append(query)
        return real(prompt, query=query)

    monkeypatch.setattr(llm.engine._reader, "read", spy)
    ask(indexes[True, True].as_query_engine(llm=llm, response_mode=mode, streaming="stream" in style), style)
    assert set(queries) == {QUESTION}


def test_list_context_is_joined_not_printed(llm: ProphetKVLLM, call_log: CallLog) -> None:
    template = PromptTemplate("Context:\n{context_str}\nQuestion: {query_str}")
    llm.predict(template, context_str=["first line\nsecond line", "third"], query_str="q")
    assert call_log.calls[0].messages[0].content == "Context:\nfirst line\nsecond line\n\nthird\nQuestion: q"


def test_template_calls_parse_and_announce_as_the_base_class_does(
    llm: ProphetKVLLM, completion_engine: ProphetKVEngine, call_log: CallLog
) -> None:
    class Brackets(BaseOutputParser):
        def parse(self, output: str) -> str:
            return f"[{output}]"

    template = PromptTemplate("Say {what}.")
    for model in (llm, ProphetKVLLM(engine=completion_engine, max_new_tokens=8)):
        plain = model.predict(template, what="hello")
        assert LLM.predict(model, template, what="hello") == plain != ""
        assert asyncio.run(model.apredict(template, what="hello")) == plain
        assert "".join(model.stream(template, what="hello")) == plain
        call_log.predictions.clear()
        model.output_parser = Brackets()
        assert model.predict(template, what="hello") == f"[{plain}]"
        assert asyncio.run(model.apredict(template, what="hello")) == f"[{plain}]"
        start, end, *_ = call_log.predictions
        assert (start.template, start.template_args, end.output) == (template, {"what": "hello"}, f"[{plain}]")
        with pytest.raises(NotImplementedError):
            model.stream(template, what="hello")
        with pytest.raises(NotImplementedError):
            asyncio.run(model.astream(template, what="hello"))


@pytest.mark.parametrize("style", ["chat", "stream_chat", "achat", "astream_chat"])
@pytest.mark.parametrize("chat_mode", ["context", "condense_plus_context"])
def test_chat_engines_reuse_every_chunk(
    chat_mode: str, style: str, indexes: dict[tuple[bool, bool], VectorStoreIndex], llm: ProphetKVLLM, call_log: CallLog
) -> None:
    memory = ChatMemoryBuffer.from_defaults(token_limit=3000)  # the default keeps a database thread past the loop's end
    chat = indexes[True, True].as_chat_engine(chat_mode=chat_mode, llm=llm, similarity_top_k=4, memory=memory)

    async def turn(text: str) -> str:
        if style == "chat":
            return str(chat.chat(text))
        if style == "stream_chat":
            return "".join(chat.stream_chat(text).response_gen)
        if style == "achat":
            return str(await chat.achat(text))
        return "".join([token async for token in (await chat.astream_chat(text)).async_response_gen()])

    async def conversation() -> list[str]:
        return [await turn(QUESTION), await turn("And on Sunday?")]

    answers = asyncio.run(conversation())
    with_chunks = [call for call in call_log.calls if call.response.raw["chunks"]]
    assert len(with_chunks) == 2
    assert len(call_log.calls) == (3 if chat_mode == "condense_plus_context" else 2)  # the second question is condensed
    for answer, call in zip(answers, with_chunks, strict=True):
        assert [chunk["status"] for chunk in call.response.raw["chunks"]] == ["hit"] * 4
        assert answer.strip() == call.response.message.content.strip()


def test_citation_query_engine_reuses_every_chunk(
    indexes: dict[tuple[bool, bool], VectorStoreIndex], llm: ProphetKVLLM, call_log: CallLog
) -> None:
    CitationQueryEngine.from_args(indexes[True, True], llm=llm, similarity_top_k=4).query(QUESTION)
    assert [chunk["status"] for chunk in call_log.chunks] == ["hit"] * 4


def test_eight_threads_get_their_own_chunks(
    fresh_engine: ProphetKVEngine, new_vector_store: Any, call_log: CallLog
) -> None:
    topics = ("zebra", "yacht", "xylophone", "walrus", "violin", "umbrella", "tunnel", "saffron")
    texts = [f"The {topic} was seen near the {topic} house, where every {topic} goes on Monday." for topic in topics]
    index = build_index(new_vector_store(fresh_engine), texts)
    llm = ProphetKVLLM(engine=fresh_engine, max_new_tokens=4)

    def worker(number: int) -> None:
        for round_ in range(3):
            streaming = (number + round_) % 2 == 0
            query_engine = index.as_query_engine(llm=llm, similarity_top_k=1, streaming=streaming)
            with instrument_tags({"topic": number}):
                ask(query_engine, "stream" if streaming else "query", f"Where was the {topics[number]}?")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(worker, range(8)))
    assert len(call_log.calls) == 24
    for call in call_log.calls:
        number = call.tags["topic"]
        assert topics[number] in call.messages[-1].content
        assert [chunk["key"] for chunk in call.response.raw["chunks"]] == [chunk_key(fresh_engine, texts[number])]
        direct = fresh_engine.generate(plain_prompt(call), max_new_tokens=4, query=f"Where was the {topics[number]}?")
        assert call.response.message.content == direct.text


def test_token_counter_sees_the_models_own_counts(llm: ProphetKVLLM) -> None:
    counter = TokenCountingHandler()
    llm.callback_manager = CallbackManager([counter])
    response = llm.chat([ChatMessage(content=QUESTION)])
    list(llm.stream_complete(QUESTION))
    assert counter.prompt_llm_token_count == 2 * response.raw["prompt_tokens"] > 0
    assert counter.completion_llm_token_count == 2 * response.raw["usage"]["completion_tokens"] > 0


def test_a_prompt_without_chunks_is_plain_prefill(llm: ProphetKVLLM) -> None:
    response = llm.chat([ChatMessage(content="Hello there.")])
    assert response.raw["chunks"] == []
    assert response.raw["fresh_tokens"] == response.raw["prompt_tokens"] > 0
