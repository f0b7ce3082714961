"""Conversations saved and loaded over HTTP: what goes on after a restart, whose they are, and what is refused."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.store.disk.store import DiskStore
from tests.conversations.chats import QUESTIONS, user, with_context
from tests.server.running import CHUNKS, MODEL_NAME, Running, make_engine, running, wait_until
from tests.tiny import tiny_llama, tiny_tokenizer

PATH = "/v1/conversations"
FIRST = [user(with_context(QUESTIONS[0], CHUNKS))]


@contextmanager
def serving(engine: ProphetKVEngine | None = None, **settings: Any) -> Iterator[Running]:
    engine = engine or make_engine(remember=True)
    engine.add_chunks(CHUNKS)
    with running(engine, **settings) as server:
        yield server


def headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ask(client: httpx.Client, messages: list[dict[str, str]], namespace: str = "default") -> dict[str, Any]:
    body = {"model": MODEL_NAME, "messages": messages, "max_tokens": 6, "prophetkv": {"namespace": namespace}}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def saved(client: httpx.Client, namespace: str = "default") -> bytes:
    response = client.get(f"{PATH}?namespace={namespace}")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/octet-stream"
    return response.content


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert "\n" not in error["message"]
    return error


def test_a_conversation_goes_on_in_another_server() -> None:
    """As it would have without the restart: the same tokens are computed, and the same answer is given."""
    with serving() as before, before.client() as client:
        said = ask(client, FIRST)["choices"][0]["message"]["content"]
        data = saved(client)
        messages = [*FIRST, {"role": "assistant", "content": said}, user(QUESTIONS[1])]
        expected = ask(client, messages)
    with serving() as after, after.client() as client:
        refusal(client.get(PATH), 404)
        loaded = client.put(PATH, content=data)
        assert loaded.status_code == 200, loaded.text
        found = loaded.json()
        assert found["namespace"] == "default"
        assert found["remembered_tokens"] == after.engine.conversations.stats().tokens > 180
        answer = ask(client, messages)
        assert answer["choices"] == expected["choices"]
        parts = ("remembered_tokens", "recomputed_tokens", "fresh_tokens", "reused_tokens")
        assert [answer["prophetkv"][part] for part in parts] == [expected["prophetkv"][part] for part in parts]
        assert answer["prophetkv"]["remembered_tokens"] > 150
        assert client.head(PATH).status_code == 200


def test_keys_and_namespaces_save_and_load_their_own() -> None:
    with serving(api_keys=("left", "right")) as server, ExitStack() as opened:
        left, right = (opened.enter_context(server.client(headers=headers(key))) for key in ("left", "right"))
        ask(left, FIRST)
        ask(left, [user(QUESTIONS[3])], "b")
        assert refusal(right.get(PATH), 404)["message"] == (
            "nothing is remembered in the namespace 'default'; answer a prompt first"
        )
        refusal(right.get(f"{PATH}?namespace=b"), 404)
        assert len(saved(left)) > 2 * len(saved(left, "b"))
        found = right.put(PATH, content=saved(left, "b")).json()
        assert 0 < found["remembered_tokens"] < 80
        tenants = server.engine.conversations.tenants()
        assert sorted(tenant.partition("/")[0] for tenant in tenants) == ["b", "default", "default"]
        with server.client() as stranger:
            refusal(stranger.get(PATH), 401)
            refusal(stranger.put(PATH, content=b"x"), 401)
        refusal(left.put(f"{PATH}?namespace=a/b", content=b"x"), 400)


def test_what_is_damaged_or_another_models_is_refused() -> None:
    other = ProphetKVEngine(tiny_llama(seed=1), tiny_tokenizer(), config=ProphetKVConfig())
    with serving(other) as server, server.client() as client:
        ask(client, FIRST)
        foreign = saved(client)
    with serving() as server, server.client() as client:
        ask(client, FIRST)
        data = saved(client)
        client.delete(PATH)
        assert "another model" in refusal(client.put(PATH, content=foreign), 400)["message"]
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        for broken in (b"", b"hello", data[:-1], data + b"\0", bytes(flipped)):
            error = refusal(client.put(PATH, content=broken), 400)
            assert error["code"] == "invalid_value"
            assert error["message"].startswith("the conversation is not loaded: it is damaged")
        assert server.engine.conversations.stats().tokens == 0
        assert client.put(PATH, content=data).status_code == 200


def test_what_is_too_large_is_neither_given_out_nor_taken() -> None:
    with serving() as server, server.client() as client:
        ask(client, FIRST)
        data = saved(client)
        nbytes = server.engine.conversations.stats().nbytes
    with serving(max_body_bytes=5000, max_conversation_bytes=len(data)) as server, server.client() as client:
        assert client.put(PATH, content=data).status_code == 200  # far beyond what other bodies may have
        assert refusal(client.put(PATH, content=data + b"\0"), 413)["code"] == "request_too_large"
        assert refusal(client.post("/v1/chat/completions", content=data[:6000]), 413)["code"] == "request_too_large"
    with serving(max_conversation_bytes=nbytes - 1) as server, server.client() as client:
        ask(client, FIRST)
        error = refusal(client.get(PATH), 413)
        assert error["code"] == "conversation_too_large"
        assert f"takes {nbytes} bytes" in error["message"]


def test_in_an_encrypted_store_only_who_saved_it_can_load_it(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    keys_of = {"mine": 0, "again": 0, "other": 1}
    stores = [
        DiskStore(tmp_path / name, encryption_key=bytes(range(first, first + 32))) for name, first in keys_of.items()
    ]
    engines = [ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=store) for store in stores]
    keys: dict[str, Any] = {"api_keys": ("left", "right")}
    with serving(engines[0], **keys) as server, server.client(headers=headers("left")) as client:
        ask(client, FIRST)
        data = saved(client)
        assert b"prophetkv-conversations" not in data
    with serving(engines[1], **keys) as server, ExitStack() as opened:
        left, right = (opened.enter_context(server.client(headers=headers(key))) for key in ("left", "right"))
        assert "for somebody else" in refusal(right.put(PATH, content=data), 400)["message"]
        assert "for somebody else" in refusal(left.put(f"{PATH}?namespace=b", content=data), 400)["message"]
        assert server.engine.conversations.stats().tokens == 0
        assert left.put(PATH, content=data).json()["remembered_tokens"] > 180
    with serving(engines[2], **keys) as server, server.client(headers=headers("left")) as client:
        assert "another key" in refusal(client.put(PATH, content=data), 400)["message"]
    for store in stores:
        store.close()


def test_two_large_bodies_are_in_memory_at_a_time() -> None:
    with serving() as server, server.client() as client, ExitStack() as opened:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        head = f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
        slow = [opened.enter_context(socket.create_connection(address, timeout=30)) for _ in range(2)]
        for one in slow:
            one.sendall(head)
        wait_until(lambda: client.put(PATH, content=b"x").status_code == 429)
        error = client.get(PATH)
        assert refusal(error, 429)["code"] == "queue_full"
        assert error.headers["retry-after"] == "1"
        assert client.delete(PATH).status_code == 200  # which is small
        slow[0].sendall(b"x" * 1000)
        assert slow[0].recv(4096).startswith(b"HTTP/1.1 400 ")
        slow[1].close()
        wait_until(lambda: client.get(PATH).status_code == 404)
