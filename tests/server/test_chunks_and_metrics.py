"""Registering chunks over HTTP, whose they are, and the figures that Prometheus reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.store.disk.store import DiskStore
from tests.server.running import CHUNKS, Running, make_engine, running
from tests.tiny import text_of, tiny_llama, tiny_tokenizer


@pytest.fixture
def server() -> Iterator[Running]:
    with running(make_engine()) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def put(client: httpx.Client, *chunks: str, **more: Any) -> list[str]:
    response = client.put("/v1/chunks", json={"chunks": list(chunks)} | more)
    assert response.status_code == 200, response.text
    return [chunk["key"] for chunk in response.json()["data"]]


def delete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.request("DELETE", "/v1/chunks", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def statuses(server: Running, *chunks: str) -> list[str]:
    return [chunk["status"] for chunk in server.ask_about(*chunks)["prophetkv"]["chunks"]]


def test_chunks_of_a_document_are_encoded_behind_each_other(server: Running, client: httpx.Client) -> None:
    keys = put(client, *CHUNKS[:4], in_order=True)
    store = server.engine.store
    assert [list(store.behind(key).keys) for key in keys] == [[], keys[:1], keys[:2], keys[1:3]]
    alone = put(client, text_of(40, seed=1), text_of(40, seed=2))  # nobody says that they are in order
    assert [store.behind(key).keys for key in alone] == [(), ()]


def test_chunks_come_and_go(server: Running, client: httpx.Client) -> None:
    assert statuses(server, *CHUNKS[:2]) == []
    keys = put(client, CHUNKS[0], f"  {CHUNKS[1]}\n", CHUNKS[0])
    assert keys[0] == keys[2] != keys[1]
    assert put(client, *CHUNKS[:2]) == keys[:2]
    assert keys == server.engine.add_chunks([CHUNKS[0], CHUNKS[1], CHUNKS[0]], owner="http:default")
    assert statuses(server, *CHUNKS[:2]) == ["hit", "hit"]
    assert statuses(server, CHUNKS[1], CHUNKS[2]) == ["hit"]
    assert delete(client, keys=keys[:1]) == {
        "object": "list",
        "namespace": "default",
        "dropped": [keys[0]],
        "deleted": [keys[0]],
    }
    assert statuses(server, *CHUNKS[:2]) == ["hit"]
    assert delete(client, chunks=[f"\n{CHUNKS[1]} ", "never stored"])["deleted"] == [keys[1]]
    assert statuses(server, *CHUNKS[:2]) == []
    assert delete(client, keys=keys)["dropped"] == []


def test_a_chunk_cut_off_inside_an_emoji(server: Running, client: httpx.Client) -> None:
    def send(method: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        return client.request(method, "/v1/chunks", content=json.dumps(body), headers=headers).json()

    half = f"{CHUNKS[0]} \ud83d"
    [found] = send("PUT", {"chunks": [half]})["data"]
    assert statuses(server, f"{CHUNKS[0]} \ufffd") == ["hit"]
    assert send("DELETE", {"chunks": [half]})["deleted"] == [found["key"]]


def test_namespaces_hold_chunks_for_themselves(server: Running, client: httpx.Client) -> None:
    [key] = put(client, CHUNKS[0])
    assert put(client, CHUNKS[0], CHUNKS[1], namespace="other.store-2")[0] == key
    server.engine.add_chunks([CHUNKS[1]], owner="a local collection")
    assert delete(client, keys=[key])["deleted"] == []
    assert statuses(server, CHUNKS[0]) == ["hit"]
    gone = delete(client, all=True, namespace="other.store-2")
    assert gone["deleted"] == [key]
    assert len(gone["dropped"]) == 2
    assert statuses(server, *CHUNKS[:2]) == ["hit"]  # the second is still the local collection's
    # An HTTP client cannot name local owners.
    assert delete(client, all=True, namespace="engine")["dropped"] == []
    assert statuses(server, *CHUNKS[:2]) == ["hit"]


def test_stats(server: Running, client: httpx.Client) -> None:
    put(client, *CHUNKS[:3])
    put(client, *CHUNKS[:1], namespace="b")
    server.ask_about(*CHUNKS[:2])
    stats = client.get("/v1/chunks").json()
    store = server.engine.store.stats()
    assert (stats["chunks"], stats["tokens"], stats["bytes"]) == (3, store.tokens, store.nbytes)
    assert stats["hits"] == 2
    assert "namespace" not in stats
    assert client.get("/v1/chunks", params={"namespace": "b"}).json()["namespace_chunks"] == 1
    assert client.get("/v1/chunks", params={"namespace": "nobody"}).json()["namespace_chunks"] == 0


@pytest.mark.parametrize(
    ("method", "body", "param"),
    [
        ("PUT", {}, "chunks"),
        ("PUT", {"chunks": []}, "chunks"),
        ("PUT", {"chunks": "text"}, "chunks"),
        ("PUT", {"chunks": [CHUNKS[1], 5]}, "chunks.1"),
        ("PUT", {"chunks": [CHUNKS[1], " \n "]}, None),
        ("PUT", {"chunks": [CHUNKS[1], text_of(2500)]}, "chunks"),
        ("PUT", {"chunks": [CHUNKS[1]], "namespace": "../x"}, "namespace"),
        ("PUT", {"chunks": [CHUNKS[1]], "namespace": ""}, "namespace"),
        ("DELETE", {}, None),
        ("DELETE", {"keys": "all"}, "keys"),
        ("DELETE", {"all": "yes"}, "all"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests_store_nothing(
    server: Running, client: httpx.Client, method: str, body: Any, param: str | None
) -> None:
    put(client, CHUNKS[0])
    response = client.request(
        method, "/v1/chunks", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert client.get("/v1/chunks", params={"namespace": "default"}).json()["namespace_chunks"] == 1
    assert statuses(server, CHUNKS[0]) == ["hit"]


def test_metrics(server: Running, client: httpx.Client) -> None:
    put(client, *CHUNKS[:2])
    first = server.ask_about(*CHUNKS[:2], max_tokens=5)["prophetkv"]
    server.engine.store.delete([first["chunks"][0]["key"]])
    second = server.ask_about(*CHUNKS[:2], max_tokens=5)["prophetkv"]
    assert [chunk["status"] for chunk in second["chunks"]] == ["miss", "hit"]
    with client.stream("POST", "/v1/chat/completions", json=server.body(*CHUNKS[:2], stream=True, max_tokens=5)) as got:
        got.read()
    client.post("/v1/chat/completions", json=server.body(model="other"))
    client.post("/v1/chat/completions", json=server.body(text_of(2500)))
    found = values(client)
    assert found["prophetkv_requests_total", "length"] == 3
    assert found["prophetkv_requests_total", "model_not_found"] == 1
    assert found["prophetkv_requests_total", "context_length_exceeded"] == 1
    statuses_seen = [found["prophetkv_chunk_lookups_total", kind] for kind in ("hit", "miss", "corrupt", "unused")]
    assert sum(statuses_seen) == 6
    assert statuses_seen[0] >= 3
    assert statuses_seen[1] >= 1
    assert statuses_seen[2:] == [0, 0]
    for kind in ("reused", "recomputed", "fresh"):
        assert found["prophetkv_prompt_tokens_total", kind] == 3 * first[f"{kind}_tokens"]
    assert found["prophetkv_generated_tokens_total",] == 15
    assert found["prophetkv_ttft_seconds_count",] == found["prophetkv_prefill_seconds_count",] == 3
    assert found["prophetkv_ttft_seconds_sum",] >= found["prophetkv_prefill_seconds_sum",] > 0
    stats = server.engine.store.stats()
    assert found["prophetkv_cache_bytes",] == stats.nbytes > 0
    assert found["prophetkv_cache_chunks",] == stats.chunks
    assert found["prophetkv_queue_length", "chat"] == found["prophetkv_running", "chat"] == 0


def values(client: httpx.Client) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def test_the_store_s_own_figures(tmp_path: Path) -> None:
    """By tier: what was found where, computed again and why, evicted, and what could not be written."""
    store = DiskStore(tmp_path, ram_bytes=1 << 20, max_bytes=200_000)
    config = ProphetKVConfig(remember=False)  # so that every prompt asks the store
    engine = ProphetKVEngine(tiny_llama(initializer_range=0.3), tiny_tokenizer(), store=store, config=config)
    engine.end_tokens = frozenset()
    with running(engine) as server, server.client() as client:
        keys = put(client, *CHUNKS[:3])
        server.ask_about(*CHUNKS[:3])
        store.drop_from_memory(keys[:2])
        server.ask_about(CHUNKS[0])
        store.drop_from_memory(keys)
        store.files.path(keys[1]).write_bytes(b"no blob")
        store.files.path(keys[2]).unlink()
        server.ask_about(*CHUNKS[1:3])
        store.flush()
        found = values(client)
        lookups = [found["prophetkv_store_lookups_total", kind] for kind in ("ram", "disk", "miss", "corrupt")]
        assert lookups == [3, 1, 1, 1]
        stats = store.stats()
        assert found["prophetkv_tier_bytes", "disk"] == stats.nbytes == on_disk(tmp_path) > 0
        assert found["prophetkv_tier_bytes", "ram"] == stats.ram_nbytes > 0
        assert found["prophetkv_cache_limit_bytes",] == 200_000
        assert found["prophetkv_store_evictions_total",] == found["prophetkv_store_failed_writes_total",] == 0
        for number in range(8):
            long = text_of(60, seed=number)
            keys = put(client, long)
            for _ in range(3):
                store.drop_from_memory(keys)
                server.ask_about(long)
                store.flush()
        assert values(client)["prophetkv_store_evictions_total",] == store.stats().evictions > 0
        store.delete(row.key for row in store.catalog.rows() if row.key not in keys)  # so that there is room for it
        shutil.rmtree(tmp_path / "blobs")
        shutil.rmtree(tmp_path / "incoming")
        store.drop_from_memory(keys)
        server.ask_about(long)
        store.flush()
        found = values(client)
        assert found["prophetkv_store_failed_writes_total",] == 1
        assert found["prophetkv_store_up",] == 1
        store.catalog.close()
        found = values(client)
        assert found["prophetkv_store_up",] == 0, "the other figures do not fail with it"
        assert ("prophetkv_running", "chat") in found


def on_disk(directory: Path) -> int:
    return sum(path.stat().st_size for path in (directory / "blobs").rglob("*.safetensors"))


def test_two_applications_have_metrics_of_their_own(server: Running) -> None:
    with running(make_engine()) as other:
        other.ask()
        assert other.metric("prophetkv_requests_total", outcome="length") == 1
    assert server.metric("prophetkv_requests_total", outcome="length") == 0
