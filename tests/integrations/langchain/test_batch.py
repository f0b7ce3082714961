"""What LangChain calls at once is answered together: fewer forwards, the same answers, each with its own report."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from langchain_classic.chains.summarize import load_summarize_chain
from langchain_core.messages import HumanMessage
from langchain_core.outputs import LLMResult

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import ContextWindowError
from prophetkv_rag.integrations.langchain import ChatProphetKV, ProphetKVLLM
from tests.held_back import held_back
from tests.integrations.conftest import cancelled_at, stream_threads, until
from tests.integrations.langchain.rag import TOWN, CallLog, town_store
from tests.integrations.rag import QUESTION

PROMPTS = [f"Context:\n{text}\n\n{QUESTION}" for text in TOWN[:4]]
TOKENS = 8

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(params=["chat", "completion"])
def model(request: pytest.FixtureRequest, chat_engine: ProphetKVEngine) -> Any:
    town_store(chat_engine)
    return (ChatProphetKV if request.param == "chat" else ProphetKVLLM)(engine=chat_engine, max_tokens=TOKENS)


def text_of(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer.text


@pytest.mark.parametrize("style", ["batch", "abatch", "generate", "agenerate"])
async def test_a_batch_shares_its_forwards(style: str, model: Any, forwards: list[int]) -> None:
    alone = [text_of(model.invoke(prompt)) for prompt in PROMPTS]
    one_by_one, log = len(forwards), CallLog()
    forwards.clear()
    several: Any = PROMPTS
    if isinstance(model, ChatProphetKV):
        several = [[HumanMessage(prompt)] for prompt in PROMPTS]
    styles: dict[str, Callable[[], Awaitable[Any]]] = {
        "batch": lambda: asyncio.to_thread(model.batch, PROMPTS, {"callbacks": [log]}),
        "abatch": lambda: model.abatch(PROMPTS, {"callbacks": [log]}),
        "generate": lambda: asyncio.to_thread(model.generate, several, callbacks=[log]),
        "agenerate": lambda: model.agenerate(several, callbacks=[log]),
    }
    with held_back(model.engine, len(PROMPTS)):
        answers = await styles[style]()
    if isinstance(answers, LLMResult):
        assert len({run.run_id for run in answers.run or ()}) == len(PROMPTS)
        answers = [each[0].text for each in answers.generations]
    assert [text_of(answer) for answer in answers] == alone
    assert len(forwards) < 0.6 * one_by_one
    assert [len(report["chunks"]) for report in log.reports] == [1] * len(PROMPTS)
    assert len({report["chunks"][0]["key"] for report in log.reports}) == len(PROMPTS)


@pytest.mark.parametrize("style", ["invoke", "ainvoke"])
async def test_map_reduce_maps_together(style: str, model: Any, forwards: list[int]) -> None:
    documents = town_store(model.engine).similarity_search(QUESTION, k=4)
    chain = load_summarize_chain(model, chain_type="map_reduce", return_intermediate_steps=True)
    one_by_one = [chain.llm_chain.invoke({"text": document.page_content})["text"] for document in documents]
    num_alone = len(forwards)
    forwards.clear()
    with held_back(model.engine, len(documents)):
        if style == "invoke":
            found = await asyncio.to_thread(chain.invoke, {"input_documents": documents})
        else:
            found = await chain.ainvoke({"input_documents": documents})
    assert found["intermediate_steps"] == one_by_one
    assert len(forwards) < 0.6 * num_alone + TOKENS + 2, "the maps share forwards; the reduction is one more call"


async def test_one_that_fails_leaves_the_others(model: Any) -> None:
    alone = [text_of(model.invoke(prompt)) for prompt in PROMPTS[:2]]
    prompts = [PROMPTS[0], "word " * 6000, PROMPTS[1]]
    if isinstance(model, ChatProphetKV):
        for found in (
            model.batch(prompts, return_exceptions=True),
            await model.abatch(prompts, return_exceptions=True),
        ):
            assert isinstance(found[1], ContextWindowError)
            assert [text_of(found[0]), text_of(found[2])] == alone
    else:  # LangChain makes one call of a completion model's batch
        with pytest.raises(ContextWindowError):
            await model.abatch(prompts)
        await until(lambda: stream_threads() == [])
    assert [text_of(answer) for answer in await model.abatch(PROMPTS[:2])] == alone


async def test_a_cancelled_batch_stops(model: Any, forwards: list[int]) -> None:
    task = asyncio.create_task(model.abatch(PROMPTS, max_tokens=500))
    with cancelled_at(9, model.engine, task), pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: stream_threads() == [])
    seen = len(forwards)
    assert seen <= 9 + 2
    assert model.invoke("Hi")
