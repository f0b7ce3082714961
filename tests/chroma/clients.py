"""A real Chroma server, and what the tests of the collection proxy say about a collection."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb

from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.chroma.records import PROPHETKV_ID
from prophetkv_rag.engine import ProphetKVEngine
from tests.tiny import text_of

A, B, C, D = (text_of(8, seed=seed) for seed in range(4))
TOO_LONG = text_of(2500, seed=9)


@contextmanager
def chroma_server(directory: Path) -> Iterator[Any]:
    """Run `chroma run` on a free loopback port; gives a function that makes a client."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = shutil.which("chroma", path=str(Path(sys.executable).parent)) or "chroma"
    command = [program, "run", "--path", str(directory), "--host", "127.0.0.1", "--port", str(port)]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while True:
            try:
                chromadb.HttpClient("127.0.0.1", port).heartbeat()
                break
            except Exception:
                if process.poll() is not None:
                    raise RuntimeError((directory / "log").read_text()) from None
                time.sleep(0.1)
        yield lambda: chromadb.HttpClient("127.0.0.1", port)
    finally:
        process.terminate()
        process.wait()


def embed(*texts: str | None) -> list[list[float]]:
    return [[float(len(text or "")), 1.0, 0.5] for text in texts]


def add(collection: KVCachingCollection, **documents: str) -> None:
    texts = list(documents.values())
    collection.add(ids=list(documents), embeddings=embed(*texts), documents=texts)


def key_of(engine: ProphetKVEngine, text: str) -> str:
    ids = engine.tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return engine.identity.key(ids)


def assert_caches_are(collection: KVCachingCollection, **expected: str | None) -> None:
    """Each record (id -> text, or `None` for no cache) carries its text's key; nothing else is stored."""
    engine = collection.engine
    raw = collection.collection.get(include=["metadatas"])
    carried = {name: (meta or {}).get(PROPHETKV_ID) for name, meta in zip(raw["ids"], raw["metadatas"], strict=True)}
    key_by_text = {text: text and key_of(engine, text) for text in set(expected.values())}
    assert carried == {name: key_by_text[text] for name, text in expected.items()}
    keys = {key for key in carried.values() if key}
    assert set(engine.store.references(collection.owner)) == keys
    assert all(key in engine.store for key in keys)
    assert engine.store.stats().chunks == len(keys)
    found = {match.key for match in engine.chunk_index.find("\n\n".join([A, B, C, D]))}
    assert found == keys
