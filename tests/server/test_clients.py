"""The clients people have, unmodified, against a real server: chunks registered once are reused in every prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from openai import AsyncOpenAI, OpenAI

from tests.server.running import CHUNKS, MODEL_NAME, Running, messages
from tests.tiny import tiny_tokenizer

PROMPT = messages(*CHUNKS[:3])


@pytest.fixture(scope="module", autouse=True)
def _registered(server: Running) -> None:
    with server.client() as client:
        client.put("/v1/chunks", json={"chunks": CHUNKS}).raise_for_status()


@pytest.fixture
def client(server: Running) -> Any:
    with OpenAI(base_url=server.api, api_key="none", max_retries=0) as made:
        yield made


def chunk_tokens() -> int:
    return sum(len(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in CHUNKS[:3])


def test_openai_client(server: Running, client: OpenAI) -> None:
    alone = server.engine.generate(PROMPT, max_new_tokens=12)
    answer = client.chat.completions.create(model=MODEL_NAME, messages=PROMPT, max_tokens=12)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == alone.finish_reason == "length"
    usage = answer.usage
    assert usage.completion_tokens == 12
    assert usage.prompt_tokens == alone.report.prompt_tokens
    assert usage.total_tokens == usage.prompt_tokens + 12
    assert usage.prompt_tokens_details.cached_tokens == alone.report.reused_tokens > 0
    report = answer.prophetkv
    assert report["chunk_tokens"] == chunk_tokens()
    assert [chunk["status"] for chunk in report["chunks"]] == ["hit"] * 3
    assert report["reused_tokens"] + report["recomputed_tokens"] == report["chunk_tokens"]
    assert report["finish_reason"] == "length"


def test_openai_client_streaming(server: Running, client: OpenAI) -> None:
    alone = server.engine.generate(PROMPT, max_new_tokens=12)
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL_NAME, messages=PROMPT, max_completion_tokens=12, stream=True, stream_options=options
        )
    )
    *pieces, usage = chunks
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == alone.text
    assert len([piece for piece in pieces if piece.choices[0].delta.content]) > 3  # it really comes in pieces
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert pieces[-1].prophetkv["reused_tokens"] == alone.report.reused_tokens
    assert all(piece.usage is None for piece in pieces)
    assert usage.choices == []
    assert usage.usage.completion_tokens == 12
    assert usage.usage.prompt_tokens_details.cached_tokens == alone.report.reused_tokens
    assert len({piece.id for piece in chunks}) == 1


def test_a_stream_without_usage_asked_for_has_none(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL_NAME, messages=PROMPT, max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


async def test_async_openai_client(server: Running) -> None:
    alone = server.engine.generate(PROMPT, max_new_tokens=6)
    async with AsyncOpenAI(base_url=server.api, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model=MODEL_NAME, messages=PROMPT, max_tokens=6, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == alone.text


def test_sampling_and_stop_reach_the_engine(server: Running, client: OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.chat.completions.create(model=MODEL_NAME, messages=PROMPT, max_tokens=16, **options).choices[0]

    sampled = [ask(temperature=1.5, top_p=0.9, seed=seed).message.content for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0] == server.engine.generate(PROMPT, max_new_tokens=16, temperature=1.5, top_p=0.9, seed=1).text
    greedy = server.engine.generate(PROMPT, max_new_tokens=16).text
    assert ask(temperature=0).message.content == greedy
    assert ask(temperature=1e-30).message.content == greedy
    stop = greedy[len(greedy) // 2 :][:3]
    for given in (stop, [stop, "never said"]):
        stopped = ask(stop=given)
        assert stopped.message.content == greedy[: greedy.index(stop)]
        assert stopped.finish_reason == "stop"


def test_reuse_options_of_a_request(server: Running, client: OpenAI) -> None:
    def ask(**options: Any) -> Any:
        extra = {"prophetkv": options}
        return client.chat.completions.create(model=MODEL_NAME, messages=PROMPT, max_tokens=8, extra_body=extra)

    full = ask(strategy="full_prefill")
    assert full.prophetkv["strategy"] == "full_prefill"
    assert full.usage.prompt_tokens_details.cached_tokens == 0
    assert (
        full.choices[0].message.content
        == server.engine.generate(PROMPT, max_new_tokens=8, strategy="full_prefill").text
    )
    assert ask(recompute_ratio=0).prophetkv["recomputed_tokens"] == 0


def test_content_parts_and_the_developer_role(server: Running, client: OpenAI) -> None:
    parts = [{"type": "text", "text": f"Context:\n{CHUNKS[0]}"}, {"type": "text", "text": "Question: How many?"}]
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}],
        max_tokens=4,
    )
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Context:\n{CHUNKS[0]}\nQuestion: How many?"},
    ]
    assert answer.choices[0].message.content == server.engine.generate(plain, max_new_tokens=4).text
    assert [chunk["status"] for chunk in answer.prophetkv["chunks"]] == ["hit"]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME


def test_llama_index_openai_like(server: Running) -> None:
    llm = OpenAILike(
        model=MODEL_NAME, api_base=server.api, api_key="none", is_chat_model=True, max_tokens=10, max_retries=0
    )
    alone = server.engine.generate(PROMPT, max_new_tokens=10)
    chat = [ChatMessage(**message) for message in PROMPT]
    answer = llm.chat(chat, temperature=0)
    assert answer.message.content == alone.text
    assert answer.raw.usage.prompt_tokens_details.cached_tokens == alone.report.reused_tokens > 0
    assert answer.raw.prophetkv["recomputed_tokens"] == alone.report.recomputed_tokens
    assert "".join(piece.delta or "" for piece in llm.stream_chat(chat, temperature=0)) == alone.text


async def test_langchain_chat_openai(server: Running) -> None:
    llm = ChatOpenAI(
        model=MODEL_NAME,
        base_url=server.api,
        api_key="none",
        max_tokens=10,
        temperature=0,
        max_retries=0,
        stream_usage=True,
    )
    alone = server.engine.generate(PROMPT, max_new_tokens=10)
    prompt = [HumanMessage(PROMPT[0]["content"])]
    answer = llm.invoke(prompt)
    assert answer.content == alone.text
    assert answer.usage_metadata["input_token_details"]["cache_read"] == alone.report.reused_tokens > 0
    pieces = list(llm.stream(prompt))
    assert "".join(str(piece.content) for piece in pieces) == alone.text
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert total.usage_metadata["input_token_details"]["cache_read"] == alone.report.reused_tokens
    assert "".join([str(piece.content) async for piece in llm.astream(prompt)]) == alone.text


def test_the_stream_on_the_wire(server: Running) -> None:
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=server.body(*CHUNKS[:1], stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert event.startswith("data: ")
        assert json.loads(event[6:])["object"] == "chat.completion.chunk"
