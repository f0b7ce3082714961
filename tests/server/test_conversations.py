"""OpenAI's clients send the whole history every time; the server computes what is new of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.conversations.chats import QUESTIONS, counted_rows, with_context
from tests.server.running import CHUNKS, MODEL_NAME, Running, make_engine, running

ANSWER = 6
SLACK = 20
"""Tokens of the template around an answer and a question, and those that are cut otherwise when they come back."""


@pytest.fixture
def remembering() -> Iterator[Running]:
    engine = make_engine(remember=True)
    engine.add_chunks(CHUNKS)
    with running(engine) as server:
        yield server


def talk(server: Running, turns: int = 4, *, api_key: str = "none", context: bool = True, **options: Any) -> list[Any]:
    """The answers of a conversation whose first question brings the chunks."""
    history: list[Any] = []
    answers = []
    with OpenAI(base_url=server.api, api_key=api_key, max_retries=0) as client:
        for number, question in enumerate(QUESTIONS[:turns]):
            content = with_context(question, CHUNKS) if context and number == 0 else question
            history.append({"role": "user", "content": content})
            answer = client.chat.completions.create(
                model=MODEL_NAME, messages=history, max_tokens=ANSWER, temperature=0, extra_body={"prophetkv": options}
            )
            history.append({"role": "assistant", "content": answer.choices[0].message.content})
            answers.append(answer)
    return answers


def test_turns_compute_what_is_new(remembering: Running) -> None:
    with counted_rows(remembering.engine) as rows:
        first, *later = talk(remembering)
    prefills = [count for count in rows if count > 1]  # a decoding step is one row
    assert first.prophetkv["remembered_tokens"] == 0
    assert first.usage.prompt_tokens > 180
    for before, question, answer in zip([first, *later], QUESTIONS[1:], later, strict=False):
        report = answer.prophetkv
        new = remembering.engine.tokenizer(question + before.choices[0].message.content)["input_ids"]
        assert report["fresh_tokens"] <= len(new) + SLACK
        assert report["reused_tokens"] == 0
        assert [chunk["status"] for chunk in report["chunks"]] == ["remembered"] * 4
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached == report["remembered_tokens"]
        assert answer.usage.prompt_tokens == cached + report["recomputed_tokens"] + report["fresh_tokens"]
        assert max(rows[rows.index(prefills[0]) + 2 :]) < first.usage.prompt_tokens / 2


def test_streams_go_on_too(remembering: Running) -> None:
    history: list[Any] = [{"role": "user", "content": QUESTIONS[0]}]
    seen = []
    with OpenAI(base_url=remembering.api, api_key="none", max_retries=0) as client:
        for question in QUESTIONS[1:4]:
            pieces = list(
                client.chat.completions.create(model=MODEL_NAME, messages=history, max_tokens=ANSWER, stream=True)
            )
            said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
            history += [{"role": "assistant", "content": said}, {"role": "user", "content": question}]
            seen.append(pieces[-1].prophetkv["remembered_tokens"])
    assert seen[0] == 0
    assert 40 < seen[1] < seen[2]


def test_it_can_be_switched_off_for_a_request(remembering: Running) -> None:
    assert [answer.prophetkv["remembered_tokens"] for answer in talk(remembering, remember=False)] == [0] * 4
    assert remembering.engine.conversations.stats().tokens == 0


def test_namespaces_and_keys_hold_conversations_for_themselves() -> None:
    engine = make_engine(remember=True)
    with running(engine, api_keys=("left", "right")) as server:
        for options in ({"api_key": "left"}, {"api_key": "right"}, {"api_key": "left", "namespace": "b"}):
            first, second = talk(server, 2, context=False, **options)
            assert first.prophetkv["remembered_tokens"] == 0 < second.prophetkv["remembered_tokens"]
        assert len(engine.conversations.tenants()) == 3
        assert not any("left" in tenant or "right" in tenant for tenant in engine.conversations.tenants())
        with server.client(headers={"Authorization": "Bearer right"}) as client:
            found = client.delete("/v1/conversations").json()
            assert found["namespace"] == "default"
            assert found["forgotten_tokens"] > 0
            assert client.delete("/v1/conversations").json()["forgotten_tokens"] == 0
            assert len(engine.conversations.tenants()) == 2
            assert client.delete("/v1/conversations?namespace=a/b").status_code == 400
        assert talk(server, 1, context=False, api_key="left")[0].prophetkv["remembered_tokens"] > 0
        assert talk(server, 1, context=False, api_key="right")[0].prophetkv["remembered_tokens"] == 0


def test_deleting_chunks_takes_the_conversations_along(remembering: Running) -> None:
    with remembering.client() as client:
        assert client.put("/v1/chunks", json={"chunks": CHUNKS[:1]}).status_code == 200
        remembering.engine.remove_chunks([remembering.engine.key_of(CHUNKS[0])])  # the first owner's
        talk(remembering, 2)
        before = remembering.engine.conversations.stats().tokens
        response = client.request("DELETE", "/v1/chunks", json={"chunks": CHUNKS[:1]})
        assert len(response.json()["deleted"]) == 1
        left = remembering.engine.conversations.stats().tokens
        assert 0 < left < 40 < before
        client.request("DELETE", "/v1/chunks", json={"all": True, "namespace": "default"})
        assert remembering.engine.conversations.stats().tokens == 0


def test_metrics_tell_of_them(remembering: Running) -> None:
    answers = talk(remembering, 3)
    remembered = sum(answer.prophetkv["remembered_tokens"] for answer in answers)
    assert remembering.metric("prophetkv_prompt_tokens_total", kind="remembered") == remembered > 0
    assert remembering.metric("prophetkv_chunk_lookups_total", status="remembered") == 8
    stats = remembering.engine.conversations.stats()
    assert remembering.metric("prophetkv_conversation_bytes") == stats.nbytes > 0
    assert remembering.metric("prophetkv_conversation_tokens") == stats.tokens
