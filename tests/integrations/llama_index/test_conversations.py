"""LlamaIndex's chat engines on an engine that remembers: what each turn computes, counted in rows of the model."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine, SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore

from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from tests.conversations.chats import counted_rows
from tests.integrations.conftest import make_engine
from tests.integrations.llama_index.test_agents import AGENTS
from tests.integrations.rag import QUESTION, TEXTS, CallLog, build_index

DOCS = Path(__file__).resolve().parents[3] / "docs" / "llama_index.md"
ENGINES: dict[str, Any] = {
    "context": ContextChatEngine,
    "condense_plus_context": CondensePlusContextChatEngine,
    "simple": SimpleChatEngine,
}


SAME, CHANGING = len(TEXTS), 1
"""How many chunks are retrieved: all, so that every turn's context is the same, or the nearest one."""


class InOrder(BaseNodePostprocessor):
    """Puts the nodes in an order of their own, and not by score: then the same ones make the same context."""

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: Any = None) -> list[NodeWithScore]:
        return sorted(nodes, key=lambda found: found.node.get_content())


QUESTIONS = [QUESTION, "And when does the harbour of Marsala close?", "How many tanks shall the factory produce?"]


def chat(name: str, top_k: int, vector_store: Any, engine: Any) -> Any:
    memory = ChatMemoryBuffer.from_defaults(token_limit=3000)
    llm = ProphetKVLLM(engine=engine, max_new_tokens=8)
    if name == "simple":
        return SimpleChatEngine.from_defaults(llm=llm, memory=memory)
    index = build_index(vector_store)
    retriever = index.as_retriever(similarity_top_k=top_k)
    return ENGINES[name].from_defaults(retriever=retriever, llm=llm, memory=memory, node_postprocessors=[InOrder()])


@pytest.mark.parametrize(
    ("name", "top_k"),
    [
        ("simple", 0),
        ("context", SAME),
        ("context", CHANGING),
        ("condense_plus_context", SAME),
        ("condense_plus_context", CHANGING),
    ],
)
def test_what_a_turn_computes(
    name: str, top_k: int, new_vector_store: Any, call_log: CallLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prophetkv_rag.reuse.continuing.RECENT", 0)  # so short a history would be computed
    engine = make_engine(remember=True)
    talker = chat(name, top_k, new_vector_store(engine), engine)
    with counted_rows(engine) as rows:
        for question in QUESTIONS:
            talker.chat(question)
    reports = [call.response.raw for call in call_log.calls]
    answers = reports if name != "condense_plus_context" else [reports[0], reports[2], reports[4]]
    ran = sum(report["row_layers"] for report in reports) // len(engine.model.model.layers)
    assert ran <= sum(rows)  # a decoding step is a row too
    assert answers[0]["remembered_tokens"] == 0
    for before, report in pairwise(answers):
        parts = ("remembered_tokens", "reused_tokens", "recomputed_tokens", "fresh_tokens")
        assert report["prompt_tokens"] == sum(report[part] for part in parts)
        assert report["fresh_tokens"] < (60 if top_k != CHANGING else 140)  # with what is said behind the context
        if top_k == CHANGING:  # the context stands before the history, which is found behind the other chunk
            assert report["remembered_tokens"] < report["prompt_tokens"] / 2
            assert report["moved_tokens"] > 20
        else:
            assert [chunk["status"] for chunk in report["chunks"]] == ["remembered"] * top_k
            assert report["reused_tokens"] == 0
            assert report["remembered_tokens"] + report["recomputed_tokens"] >= before["prompt_tokens"]
            assert report["moved_tokens"] == 0


def test_the_docs_say_so() -> None:
    text = DOCS.read_text("utf-8").partition("<!-- conversations table -->")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert set(rows) == {*ENGINES, "condense_question", *AGENTS}
