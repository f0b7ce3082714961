"""The table in docs/llama_index.md says of every engine what it reuses; each row is run and measured here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.instrumentation import get_dispatcher

from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from tests.integrations.llama_index.reuse_table import ROWS, Meter, Row, Town, measure, new_index
from tests.integrations.rag import build_index

DOCS = Path(__file__).resolve().parents[3] / "docs" / "llama_index.md"


def table() -> dict[str, str]:
    """The lines of the docs' table by their first cell."""
    text = DOCS.read_text("utf-8").partition("<!-- reuse table -->")[2].partition("\n\n")[0]
    lines = [line for line in text.strip().splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[1:]}


@pytest.fixture
def meter() -> Iterator[Meter]:
    meter = Meter()
    root = get_dispatcher()
    root.add_event_handler(meter)
    yield meter
    root.event_handlers.remove(meter)


@pytest.fixture
def town(fresh_engine: Any, new_vector_store: Any) -> Town:
    index = build_index(new_vector_store(fresh_engine), file_name="town.md")
    return Town(fresh_engine, index, lambda engine, nodes: new_index(new_vector_store(engine), nodes))


def test_the_table_has_these_rows() -> None:
    assert list(table()) == [row.name for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_row_is_what_is_measured(row: Row, town: Town, meter: Meter) -> None:
    verdict, calls = measure(row, town, meter)
    assert table().get(row.name) == f"| {row.name} | {verdict} | {calls} | {row.why} |"


def test_function_agents_are_refused(llm: ProphetKVLLM) -> None:
    """They need a model that LlamaIndex knows to call functions; `ReActAgent` is the one for local models."""

    async def talk() -> None:
        await FunctionAgent(tools=[], llm=llm).run("Hello")

    with pytest.raises(ValueError, match="FunctionCallingLLM"):
        asyncio.run(talk())
