"""Texts that postprocessors make: cached on first use, few of them, gone with their document, and nobody else's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core import Document, get_response_synthesizer
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.schema import NodeWithScore, TextNode

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index import AlteredTextCache, ProphetKVLLM
from prophetkv_rag.store.disk.store import DiskStore
from tests.integrations.conftest import MODEL, make_engine
from tests.integrations.rag import QUESTION, CallLog, build_index
from tests.tiny import text_of, tiny_tokenizer


def node(text: str, *, ref_doc_id: str | None = None, **fields: Any) -> NodeWithScore:
    made = TextNode(text=text, **fields)
    if ref_doc_id is not None:
        made.relationships["1"] = Document(text="", id_=ref_doc_id).as_related_node_info()
    return NodeWithScore(node=made, score=1.0)


def synthesize(engine: ProphetKVEngine, *nodes: NodeWithScore, style: str = "sync") -> Any:
    synthesizer = get_response_synthesizer(llm=ProphetKVLLM(engine=engine, max_new_tokens=4))
    if style == "async":
        return asyncio.run(synthesizer.asynthesize(QUESTION, list(nodes)))
    return synthesizer.synthesize(QUESTION, list(nodes))


def statuses(log: CallLog) -> list[list[str]]:
    return [[chunk["status"] for chunk in call.response.raw["chunks"]] for call in log.calls]


def cached(engine: ProphetKVEngine) -> int:
    return engine.store.stats().chunks


@pytest.mark.parametrize("style", ["sync", "async"])
def test_cached_on_first_use_and_dropped_at_the_end(
    style: str, fresh_engine: ProphetKVEngine, call_log: CallLog
) -> None:
    texts = [text_of(20, seed=seed) for seed in range(2)]
    with AlteredTextCache(ProphetKVLLM(engine=fresh_engine)) as altered:
        for _ in range(2):
            synthesize(fresh_engine, *map(node, texts), style=style)
        assert statuses(call_log) == [["miss", "miss"], ["hit", "hit"]]
        assert len(altered) == cached(fresh_engine) == 2
    assert (len(altered), cached(fresh_engine)) == (0, 0)
    synthesize(fresh_engine, *map(node, texts))
    assert statuses(call_log)[-1] == []
    assert not [handler for handler in get_dispatcher().span_handlers if "Listener" in type(handler).__name__]


def test_seeing_a_text_runs_no_model(fresh_engine: ProphetKVEngine) -> None:
    """It happens inside `asynthesize`, on the event loop."""
    passes: list[Any] = []
    hook = fresh_engine.model.register_forward_pre_hook(lambda *args: passes.append(args))
    try:
        altered = AlteredTextCache(ProphetKVLLM(engine=fresh_engine))
        altered.see([node(text_of(30))])
    finally:
        hook.remove()
    assert (len(altered), passes) == (1, [])


def test_only_the_texts_used_last_are_kept(fresh_engine: ProphetKVEngine) -> None:
    texts = [text_of(12, seed=seed) for seed in range(6)]
    with AlteredTextCache(ProphetKVLLM(engine=fresh_engine), max_texts=3) as altered:
        for text in texts[:3]:
            synthesize(fresh_engine, node(text))
        synthesize(fresh_engine, node(texts[0]))
        for text in texts[3:5]:
            synthesize(fresh_engine, node(text))
        assert len(altered) == cached(fresh_engine) == len(fresh_engine.chunk_index) == 3
        found = [bool(fresh_engine.chunk_index.find(text)) for text in texts]
        assert found == [True, False, False, True, True, False]
    with pytest.raises(InputError, match="max_texts"):
        AlteredTextCache(ProphetKVLLM(engine=fresh_engine), max_texts=0)


def test_tenants_do_not_see_each_others_texts(call_log: CallLog) -> None:
    """One engine each, on one model; both ask with the same text at the same time."""
    one, two, bystander = make_engine(), make_engine(), make_engine()
    secret = text_of(20, seed=7)
    with AlteredTextCache(ProphetKVLLM(engine=one)), AlteredTextCache(ProphetKVLLM(engine=two)) as second:
        synthesize(one, node(secret))
        assert len(second) == cached(two) == 0
        assert not two.chunk_index.find(secret)
        synthesize(two, node(secret))
        synthesize(bystander, node(secret))
        assert statuses(call_log) == [["miss"], ["miss"], []]


def test_gone_with_the_document(fresh_engine: ProphetKVEngine, new_vector_store: Any) -> None:
    store = new_vector_store(fresh_engine)
    index = build_index(store)
    indexed = cached(fresh_engine)
    parts = [node(f"A part of document {i}, made anew.", ref_doc_id=f"doc-{i}") for i in range(4)]
    with AlteredTextCache(ProphetKVLLM(engine=fresh_engine)) as altered:
        synthesize(fresh_engine, *parts)
        assert cached(fresh_engine) == indexed + 4
        index.delete_ref_doc("doc-0")
        assert len(altered) == 3
        index.update_ref_doc(Document(text="Document 1 is about something else now.", id_="doc-1"))
        assert len(altered) == 2
        assert not fresh_engine.chunk_index.find(parts[0].node.text)
        assert cached(fresh_engine) == (indexed - 1) + 2
        store.clear()
        assert (len(altered), cached(fresh_engine)) == (0, 0)


def test_indexed_texts_stay_the_index_s(fresh_engine: ProphetKVEngine, new_vector_store: Any) -> None:
    store = new_vector_store(fresh_engine)
    index = build_index(store, [text_of(20)])
    with AlteredTextCache(ProphetKVLLM(engine=fresh_engine)) as altered:
        synthesize(fresh_engine, node(text_of(20)))
        assert len(altered) == 0
        index.delete_ref_doc("doc-0")
        assert cached(fresh_engine) == 0


def test_texts_that_cannot_be_chunks_are_left_alone(fresh_engine: ProphetKVEngine) -> None:
    altered = AlteredTextCache(ProphetKVLLM(engine=fresh_engine))
    altered.see([node("short"), node("  "), node(text_of(5000)), node(text_of(9))])
    assert len(altered) == 1


def test_a_failing_store_does_not_break_the_answer(
    fresh_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError("disk full")

    with AlteredTextCache(ProphetKVLLM(engine=fresh_engine)):
        monkeypatch.setattr(fresh_engine.store, "add_references", full)
        assert str(synthesize(fresh_engine, node(text_of(20))))
        assert str(synthesize(fresh_engine, node(text_of(21))))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1, warnings
    assert "cannot be stored" in warnings[0]


def test_a_persistent_store_is_left_clean(tmp_path: Any) -> None:
    """What a process that died left behind is dropped by the next one, and an indexed twin is found after a restart."""
    text, twin = text_of(20, seed=1), text_of(20, seed=2)

    def start() -> tuple[ProphetKVEngine, AlteredTextCache]:
        engine = ProphetKVEngine(MODEL, tiny_tokenizer(), store=DiskStore(tmp_path))
        return engine, AlteredTextCache(ProphetKVLLM(engine=engine))

    engine, altered = start()
    altered.open()
    synthesize(engine, node(text), node(twin))
    engine.add_chunks([twin])  # indexed later: now the store must know its text
    get_dispatcher().span_handlers.remove(altered._handler)  # as if the process had died
    engine.store.close()

    engine, altered = start()
    assert engine.chunk_index.find(twin)
    assert not engine.chunk_index.find(text), "an altered text is known to the process that saw it"
    with altered:
        assert cached(engine) == 1
    engine.store.close()
