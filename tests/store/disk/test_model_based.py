"""Random adds, updates, deletes, questions, evictions, collections and restarts, against a dictionary."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
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
CONFIG = ProphetKVConfig(
    recompute_ratio=0.0, index_batch_tokens=64, encoding="plain", prompt_template="Read: {context}"
)
CLEAN = ProphetKVEngine(MODEL, TOKENIZER, config=CONFIG)
CLEAN.add_chunks(TEXTS)
NAMES = ("machine-first", "machine-second")
BLOB_BYTES = 25_000  # about one of these texts' blobs
limits, rams = st.sampled_from([0, 2 * BLOB_BYTES, 4 * BLOB_BYTES]), st.sampled_from([0, 3 * BLOB_BYTES])

names, texts, ids = st.sampled_from(NAMES), st.integers(0, len(TEXTS) - 1), st.sampled_from(["a", "b", "c", "d"])


class StoreMachine(RuleBasedStateMachine):
    """The model is `held`: for each collection the text of each id."""

    config = CONFIG

    def __init__(self) -> None:
        super().__init__()
        identity = ProphetKVEngine(MODEL, TOKENIZER, config=self.config).identity
        self.keys = [identity.key(chunk.input_ids) for chunk in CLEAN.read(" ".join(TEXTS)).chunks]
        self.seconds = [CLEAN.identity.key(chunk.input_ids) for chunk in CLEAN.read(" ".join(TEXTS)).chunks]
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
        self.engine = ProphetKVEngine(MODEL, TOKENIZER, config=self.config, store=self.store)
        self.collections = {
            name: KVCachingCollection(
                self.client.get_or_create_collection(name, embedding_function=None), self.engine, in_background=False
            )
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
        assert [chunk.key for chunk in result.report.chunks] == [
            self.keys[number] for number in wanted if number in known
        ]
        assert all(chunk.status in ("hit", "miss") for chunk in result.report.chunks)
        if self.config is not CONFIG:
            result = self.engine.prefill(prompt, recompute_ratio=1.0)
            full = CLEAN.prefill(prompt, recompute_ratio=1.0)
        else:
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
            wanted = {self.keys[text] for text in records.values()}
            assert set(self.store.references(self.collections[name].owner)) == wanted
        held = {text for records in self.held.values() for text in records.values()}
        known = {self.keys[text] for text in held}
        assert {key for key in self.keys if self.store.knows(key)} == known
        seconds = {self.seconds[text] for text in held}  # of chunks that stood first in a prompt
        assert {key for key in self.seconds if self.store.knows(key)} <= seconds
        assert {path.stem for path in (self.directory / "blobs").rglob("*.safetensors")} <= known | seconds
        assert set(self.store._ram.keys()) <= known | seconds
        assert self.store._ram.nbytes <= self.ram

    def on_disk(self) -> int:
        self.store.flush()
        return sum(path.stat().st_size for path in (self.directory / "blobs").rglob("*.safetensors"))

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert self.store.verify().num_faults == 0
            self.store.close()
        shutil.rmtree(self.directory)


class EncodedMachine(StoreMachine):
    """The same, where chunks are encoded behind others: no blob bears the trace of what is not held any more."""

    config = replace(CONFIG, encoding="neighbours:2")

    @rule(name=names, refresh=st.booleans())
    def encode(self, name: str, refresh: bool) -> None:
        self.collections[name].encode_behind_neighbours(refresh=refresh)

    @invariant()
    def no_trace_is_left(self) -> None:
        if not hasattr(self, "store"):
            return
        known = {self.keys[text] for records in self.held.values() for text in records.values()}
        for path in (self.directory / "blobs").rglob("*.safetensors"):
            behind = self.store.files.read_header(path.stem).behind
            assert set(behind.traces) <= known
            assert self.store.behind(path.stem).keys == behind.keys


class ChainedMachine(EncodedMachine):
    """And behind the chunks before them in their document, here what was written in one call."""

    config = replace(CONFIG, encoding="previous:2")

    @rule(name=names, records=st.lists(ids, min_size=2, max_size=4, unique=True), data=st.data())
    def upsert_document(self, name: str, records: list[str], data: st.DataObject) -> None:
        document = [data.draw(texts) for _ in records]
        self.collections[name].upsert(
            ids=records,
            documents=[TEXTS[text] for text in document],
            embeddings=[[float(text), 1.0] for text in document],
        )
        self.held[name] |= dict(zip(records, document, strict=True))


TestEncodedStore = EncodedMachine.TestCase
TestChainedStore = ChainedMachine.TestCase
TestStoreAgainstADictionary = StoreMachine.TestCase
for case in (TestEncodedStore, TestChainedStore, TestStoreAgainstADictionary):
    case.settings = settings(max_examples=8, stateful_step_count=20, deadline=None, derandomize=True, database=None)
