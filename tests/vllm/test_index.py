"""`prophetkv-rag index --engine vllm` and a server of its database, in processes of their own, as a user has them."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace

import httpx
import pytest
import torch

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.cli.database_settings import require_settings
from prophetkv_rag.cli.indexing import NODES_PER_INSERT, split_texts
from prophetkv_rag.store.disk import open_disk_store
from tests.tiny import save_tiny, text_of, tiny_tokenizer
from tests.vllm.running import PROGRAM, VLLM_ARGS, serving
from tests.vllm.serving import AS_IN_VLLM
from tests.vllm.test_models import SHAPE

pytestmark = pytest.mark.model  # it embeds


def text(number):
    return " ".join(text_of(60, seed=10 * number + part) for part in range(4))


BEGINNING = "Use this:\n\n"
FILES = {"a.txt": text(0), "b.txt": text(1), "c.txt": text(2)}
NEW = text(9)
CHUNK_SIZE = 100


def index(place, *arguments):
    command = [PROGRAM, "index", str(place / "documents"), "--db", str(place / "db"), "--json", *arguments]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with documents and a database of them, of a model that is beside it."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "model", **SHAPE)
    (place / "documents").mkdir()
    for name, text in FILES.items():
        (place / "documents" / name).write_text(text)
    (place / "prompt.txt").write_text(BEGINNING + "{context}\n\n{question}")
    subprocess.run([PROGRAM, "cache", "new-key", str(place / "key")], check=True)
    report = index(
        place,
        *("--engine", "vllm", "--model", str(place / "model"), "--chunk-size", str(CHUNK_SIZE)),
        *("--prompt-template", str(place / "prompt.txt")),
        *("--cache-format", "bf16", "--key-file", str(place / "key"), "--vllm-args", json.dumps(VLLM_ARGS)),
    )
    assert report["caches"]["chunks"] == report["planned"]["chunks"] == report["total_chunks"] > 9
    assert abs(report["caches"]["nbytes"] / report["planned"]["nbytes"] - 1) < 0.05
    return place


@pytest.fixture(scope="module")
def server(place):
    with serving(place / "model", place, database=place / "db") as found:
        yield found.url


def chunks_of(*names):
    """The chunks that `index` made of these files."""
    texts = [(NEW if name == "new" else FILES[f"{name}.txt"]) for name in names]
    return [chunk.strip() for chunks in split_texts(texts, CHUNK_SIZE, tiny_tokenizer()) for chunk in chunks]


def post(server, chunks, **ours):
    content = BEGINNING + "\n\n".join(chunks) + f"\n\n{text_of(8, seed=200)}"
    body = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
    body["prophetkv"] = {"remember": False} | ours
    answer = httpx.post(f"{server}/chat/completions", json=body, timeout=None)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of_answer(answer):
    return answer["choices"][0]["message"]["content"].rstrip("\ufffd")


def test_caches_are_our_engine_s_but_for_their_identity(place, tmp_path):
    ours = open_disk_store(tmp_path, ram_bytes=0, blob_format="bf16")
    template = [{"role": "user", "content": BEGINNING + "{context}"}]
    config = replace(AS_IN_VLLM, prompt_template=template)
    engine = ProphetKVEngine.from_pretrained(place / "model", config=config, store=ours)
    documents = [chunks_of(name) for name in "abc"]
    chunks = [(text, one[max(0, number - 2) : number]) for one in documents for number, text in enumerate(one)]
    for start in range(0, len(chunks), NODES_PER_INSERT):  # what is in the store by then is rounded
        texts, behind = zip(*chunks[start : start + NODES_PER_INSERT], strict=True)
        engine.add_chunks(texts, behind=behind)
    settings = require_settings(place / "db")
    assert (settings.engine, settings.vllm_args["dtype"], settings.encoding) == ("vllm", "float32", "previous:2")
    options = {"encryption_key": settings.key_file, "blob_format": "bf16"}
    store = open_disk_store(place / "db" / "prophetkv", ram_bytes=0, **options)
    try:
        found = {key: engine.identity.key(ids) for key, ids in store.new_chunks(settings.cached_for)}
        assert sorted(found.values()) == sorted(engine.key_of(text) for text, _ in chunks)
        for key, own in found.items():
            cache = store.find(key, fingerprint=settings.cached_for, input_ids=None).cache
            expected = ours.find(own, fingerprint=engine.identity.fingerprint, input_ids=None).cache
            assert [found[one] for one in cache.behind.keys] == list(expected.behind.keys)
            for one, other in zip((*cache.keys, *cache.values), (*expected.keys, *expected.values), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-2, atol=5e-3)  # the last bit of bf16
    finally:
        store.close()
        ours.close()


def test_a_chat_with_chunks_of_the_database(server):
    chunks = chunks_of("c", "a")[1:]
    for status in ("miss", "hit"):  # its first chunk stands behind another one: the second cache comes with a chat
        said = post(server, chunks)["prophetkv"]
        assert [chunk["status"] for chunk in said["chunks"]] == [status] + ["hit"] * (len(chunks) - 1)
        assert said["reused_tokens"] > 0.9 * said["chunk_tokens"]
    full = post(server, chunks, strategy="full_prefill")
    assert full["prophetkv"]["reused_tokens"] == 0
    exact = post(server, chunks, recompute_ratio=1.0)
    assert exact["prophetkv"]["recomputed_tokens"] == exact["prophetkv"]["chunk_tokens"] > 0
    assert text_of_answer(exact) == text_of_answer(full)


def test_what_another_process_indexes_and_removes_is_followed_while_it_serves(server, place):
    assert post(server, chunks_of("b"))["prophetkv"]["reused_tokens"] > 0
    (place / "documents" / "a.txt").write_text(NEW)
    (place / "documents" / "b.txt").unlink()
    report = index(place)  # the database remembers engine, model and vLLM's settings
    assert (report["indexed"], report["removed"], report["unchanged"]) == (["a.txt"], ["b.txt"], ["c.txt"])
    assert report["caches_not_kept"] == 0
    new, gone, kept = chunks_of("new"), chunks_of("b", "a"), chunks_of("c")
    assert report["new_chunks"] == len(new)
    assert post(server, gone)["prophetkv"]["reused_tokens"] == 0
    said = post(server, [*kept, *new])["prophetkv"]
    assert [chunk["status"] for chunk in said["chunks"]][1:] == ["hit"] * (len(kept) + len(new) - 1)
    metrics = httpx.get(f"{server.removesuffix('/v1')}/metrics").text
    assert "vllm:prophetkv_requests_total" in metrics
