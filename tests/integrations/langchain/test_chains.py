"""Unmodified chains reuse every retrieved chunk, however they are run; docs/langchain.md says which, and is checked."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain

from prophetkv_rag import Prompt
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.langchain import ChatProphetKV, ProphetKVLLM
from tests.integrations.langchain.chains import CHAINS, INPUT, PROMPT, STYLES, run
from tests.integrations.langchain.rag import TOWN, CallLog, town_store
from tests.integrations.rag import QUESTION
from tests.integrations.taught import taught_engine

DOCS = Path(__file__).resolve().parents[3] / "docs" / "langchain.md"


@pytest.fixture(scope="module")
def stores(chat_engine: ProphetKVEngine) -> dict[bool, Any]:
    """Whether the engine's template shows tools -> the corpus on that engine."""
    found = {False: town_store(chat_engine), True: town_store(taught_engine())}
    for store in found.values():
        for text in TOWN:  # whichever stands first in a prompt has its second cache already
            store.engine.prefill(Prompt("", [text], "\nWhy?"))
    return found


@pytest.fixture
def log() -> Iterator[CallLog]:
    return CallLog()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_in_every_style(name: str, style: str, stores: dict[bool, Any], log: CallLog) -> None:
    chain, store = CHAINS[name], stores[CHAINS[name].needs_tools]
    times = 2 if "batch" in style else 1
    model = ChatProphetKV(engine=store.engine, max_tokens=80 if chain.needs_tools else 4)
    run(chain.build(model, store), style, {"callbacks": [log]})
    assert len(log.reports) == chain.calls * times
    in_prompts = sum(prompt.count(text) for prompt in log.prompts for text in TOWN)
    assert in_prompts == chain.held * times, "the chain is not the one that the table speaks of"
    assert [chunk["status"] for chunk in log.chunks] == ["hit"] * (chain.reused * times)


@pytest.mark.parametrize("name", ["create_retrieval_chain", "LCEL with format_docs", "RetrievalQA refine"])
@pytest.mark.parametrize("style", ["invoke", "astream", "abatch"])
def test_the_completion_model_reuses_too(name: str, style: str, stores: dict[bool, Any], log: CallLog) -> None:
    chain = CHAINS[name]
    run(
        chain.build(ProphetKVLLM(engine=stores[False].engine, max_tokens=4), stores[False]), style, {"callbacks": [log]}
    )
    assert [chunk["status"] for chunk in log.chunks] == ["hit"] * (chain.reused * (2 if style == "abatch" else 1))


def test_the_table_in_the_docs_is_what_runs() -> None:
    rows = re.findall(r"^\| (.+?) \| (fully|partly|not)\b", DOCS.read_text("utf-8"), re.MULTILINE)
    assert {name.replace("`", ""): verdict for name, verdict in rows} == {
        name: chain.verdict for name, chain in CHAINS.items()
    }


def test_without_format_docs_there_is_one_warning(stores: dict[bool, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = ChatProphetKV(engine=stores[False].engine, max_tokens=2)
    chain = CHAINS["LCEL without format_docs"].build(model, stores[False])
    with caplog.at_level(logging.WARNING):
        chain.invoke(INPUT)
        list(chain.stream(INPUT))
        chain.batch([INPUT, INPUT])
    warnings = [record.message for record in caplog.records if "format_docs" in record.message]
    assert len(warnings) == 1
    assert "retriever | format_docs" in warnings[0]
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        CHAINS["LCEL with format_docs"].build(ChatProphetKV(engine=model.engine, max_tokens=2), stores[False]).invoke(
            INPUT
        )
    assert not caplog.records


def test_the_question_asks(stores: dict[bool, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage I asks with the question itself, where LangChain's prompts put it; the tokens it asks with are checked."""
    engine, seen = stores[False].engine, []
    real = engine._reader.read

    def spy(prompt: Any, **kwargs: Any) -> Any:
        seen.append(real(prompt, **kwargs))
        return seen[-1]

    monkeypatch.setattr(engine._reader, "read", spy)
    model = ChatProphetKV(engine=engine, max_tokens=2)
    for name in ("create_retrieval_chain", "RetrievalQA stuff", "ConversationalRetrievalChain"):
        seen.clear()
        CHAINS[name].build(model, stores[False]).invoke(INPUT)
        rows = list(seen[-1].question_rows)
        assert QUESTION in engine.tokenizer.decode(seen[-1].input_ids[rows]), name


def test_ratio_one_answers_as_full_prefill(stores: dict[bool, Any]) -> None:
    answers = {}
    for label, settings in (("exact", {"recompute_ratio": 1.0}), ("full", {"strategy": "full_prefill"})):
        model = ChatProphetKV(engine=stores[False].engine, max_tokens=24, **settings)
        chain = create_retrieval_chain(stores[False].as_retriever(), create_stuff_documents_chain(model, PROMPT))
        answers[label] = chain.invoke(INPUT)["answer"]
    assert answers["exact"] == answers["full"] != ""
    own = stores[False].engine.model
    prompt = stores[False].engine.read(
        [
            {"role": "system", "content": "Answer from the context.\n\n" + "\n\n".join(texts_in_order(stores[False]))},
            {"role": "user", "content": QUESTION},
        ]
    )
    tokens = own.generate(prompt.input_ids[None], max_new_tokens=24, do_sample=False)[0, prompt.num_tokens :]
    assert stores[False].engine.tokenizer.decode(tokens, skip_special_tokens=True) == answers["full"]


def texts_in_order(store: Any) -> list[str]:
    return [document.page_content for document in store.as_retriever().invoke(QUESTION)]
