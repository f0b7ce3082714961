"""Random adds, updates, deletes, questions, evictions, collections and restarts, against a dictionary."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import chromadb
import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.chroma import KVCachingCollection
from prophetkv_rag.chroma.store import live_references
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.upkeep import gc
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

MODEL, TOKENIZER = tiny_llama(), tiny_tokenizer()
TEXTS = [text_of(12, seed=seed) for seed in range(7)]
CONFIG = ProphetKVConfig(recompute_ratio=0.0, index_batch_tokens=64)
CLEAN = ProphetKVEngine(MODEL, TOKENIZER, config=CONFIG)
KEYS = CLEAN.add_chunks(TEXTS)
NAMES = ("machine-first", "machine-second")
BLOB_BYTES = 25_000  # about one of these texts' blobs
limits, rams = st.sampled_from([0, 2 * BLOB_BYTES, 4 * BLOB_BYTES]), st.sampled_from([0, 3 * BLOB_BYTES])

names, texts, ids = st.sampled_from(NAMES), st.integers(0, len(TEXTS) - 1), st.sampled_from(["a", "b", "c", "d"])


class StoreMachine(RuleBasedStateMachine):
    """The model is `held`: for each collection the text of each id."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.client = chromadb.EphemeralClient()
        self.held: dict[str, dict[str, int]] = {name: {} for name in NAMES}
        self.limit = 3 * BLOB_BYTES

    @initialize(limit=limits, each=limits, ram=rams, policy=st.sampled_from(["eager", "on_first_use"]))
    def start(self, limit: int, each: int, ram: int, policy: Any) -> None:
        self.limit, self.each, self.ram, self.policy = limit, each, ram, policy
        for name in NAMES:
            if name in [collection.name for collection in self.client.list_collections()]:
                self.client.delete_collection(name)
        self.open()

    def open(self) -> None:
        self.store = DiskStore(
            self.directory, self.ram, max_bytes=self.limit, namespace_max_bytes=self.each, policy=self.policy
        )
        self.engine = ProphetKVEngine(MODEL, TOKENIZER, config=CONFIG, store=self.store)
        self.collections = {
            name: KVCachingCollection(self.client.get_or_create_collection(name, embedding_function=None), self.engine)
            for name in NAMES
        }

    @rule(name=names, record=ids, text=texts)
    def add(self, name: str, record: str, text: int) -> None:
        self.collections[name].add(ids=[record], documents=[TEXTS[text]], embeddings=[[float(text), 1.0]])
        self.held[name].setdefault(record, text)

    @rule(name=names, record=ids, text=texts)
    def upsert(self, name: str, record: str, text: int) -> None:
        self.collections[name].upsert(ids=[record], documents=[TEXTS[text]], embeddings=[[float(text), 1.0]])
        self.held[name][record] = text

    @rule(name=names, record=ids)
    def delete(self, name: str, record: str) -> None:
        self.collections[name].delete(ids=[record])
        self.held[name].pop(record, None)

    @rule(wanted=st.lists(texts, min_size=1, max_size=3, unique=True))
    def ask(self, wanted: list[int]) -> None:
        prompt = "Read: " + " ".join(TEXTS[number] for number in wanted) + " So?"
        result = self.engine.prefill(prompt)
        known = {text for records in self.held.values() for text in records.values()}
        assert [chunk.key for chunk in result.report.chunks] == [KEYS[number] for number in wanted if number in known]
        assert all(chunk.status in ("hit", "miss") for chunk in result.report.chunks)
        full = CLEAN.prefill(prompt)
        if len(result.report.chunks) == len(wanted):
            torch.testing.assert_close(result.logits, full.logits, atol=1e-4, rtol=1e-4)

    @precondition(lambda self: self.limit)
    @rule()
    def evict(self) -> None:
        """Questions about one text again and again push others out."""
        for text in [text for records in self.held.values() for text in records.values()][:2]:
            for _ in range(3):
                self.ask([text])
                self.store.flush()

    @rule()
    def collect(self) -> None:
        report = gc(self.store, live_references(self.client), grace_s=-1)
        assert (report.orphans, report.unreferenced, report.stale_references) == (0, 0, 0), "nothing was left over"

    @rule(limit=limits, each=limits, ram=rams)
    def restart(self, limit: int, each: int, ram: int) -> None:
        self.store.close()
        self.limit, self.each, self.ram = limit, each, ram
        self.open()

    @invariant()
    def it_is_as_the_dictionary_says(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.on_disk() <= min(self.limit, self.each)
        for name, records in self.held.items():
            wanted = {KEYS[text] for text in records.values()}
            assert set(self.store.references(self.collections[name].owner)) == wanted
        known = {KEYS[text] for records in self.held.values() for text in records.values()}
        assert {key for key in KEYS if self.store.knows(key)} == known
        assert {path.stem for path in (self.directory / "blobs").rglob("*.safetensors")} <= known
        assert set(self.store._ram.keys()) <= known
        assert self.store._ram.nbytes <= self.ram

    def on_disk(self) -> int:
        self.store.flush()
        return sum(path.stat().st_size for path in (self.directory / "blobs").rglob("*.safetensors"))

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert self.store.verify().num_faults == 0
            self.store.close()
        shutil.rmtree(self.directory)


TestStoreAgainstADictionary = StoreMachine.TestCase
TestStoreAgainstADictionary.settings = settings(
    max_examples=8, stateful_step_count=20, deadline=None, derandomize=True, database=None
)
