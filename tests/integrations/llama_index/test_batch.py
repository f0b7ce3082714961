"""What LlamaIndex calls at once is answered together: fewer forwards, the same answers."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.query_engine import SubQuestionQueryEngine
from llama_index.core.question_gen.types import SubQuestion
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.tools import QueryEngineTool

from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from tests.held_back import held_back
from tests.integrations.rag import QUESTION, TEXTS

PROMPTS = [f"Context:\n{text}\n\n{QUESTION}" for text in TEXTS[:4]]
NODES = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in TEXTS[:4]]

pytestmark = pytest.mark.usefixtures("patient")


@pytest.mark.parametrize("style", ["acomplete", "achat"])
async def test_calls_at_once_share_forwards(style: str, llm: ProphetKVLLM, forwards: list[int]) -> None:
    if style == "achat":
        alone = [llm.chat([ChatMessage(prompt)]).message.content for prompt in PROMPTS]
    else:
        alone = [llm.complete(prompt).text for prompt in PROMPTS]
    one_by_one = len(forwards)
    forwards.clear()
    with held_back(llm.engine, len(PROMPTS)):
        if style == "achat":
            answers = await asyncio.gather(*(llm.achat([ChatMessage(prompt)]) for prompt in PROMPTS))
            found = [answer.message.content for answer in answers]
        else:
            found = [answer.text for answer in await asyncio.gather(*(llm.acomplete(prompt) for prompt in PROMPTS))]
    assert found == alone
    assert len(forwards) < 0.6 * one_by_one


@pytest.mark.parametrize("mode", ["accumulate", "tree_summarize"])
def test_synthesizers_that_ask_at_once(mode: Any, llm: ProphetKVLLM, forwards: list[int]) -> None:
    llm.engine.add_chunks(TEXTS[:4])
    # So small a window that a tree has a leaf for each node.
    small = llm.model_copy(update={"context_window": 220, "max_new_tokens": 8}) if mode == "tree_summarize" else llm
    synthesizer = get_response_synthesizer(llm=small, response_mode=mode, use_async=False)
    expected = str(synthesizer.synthesize(QUESTION, NODES))
    one_by_one = len(forwards)
    forwards.clear()
    at_once = get_response_synthesizer(llm=small, response_mode=mode, use_async=True)
    with held_back(llm.engine, len(NODES) if mode == "accumulate" else 2):
        assert str(at_once.synthesize(QUESTION, NODES)) == expected
    assert len(forwards) < 0.75 * one_by_one


def test_sub_questions_at_once(llm: ProphetKVLLM, indexes: dict[tuple[bool, bool], VectorStoreIndex]) -> None:
    """The generator of sub-questions is given its questions: a random model would write none."""
    tool = QueryEngineTool.from_defaults(indexes[True, False].as_query_engine(llm=llm), name="town", description="It")

    class Given:
        def generate(self, *_: Any) -> list[SubQuestion]:
            return [SubQuestion(sub_question=f"{QUESTION} {number}", tool_name="town") for number in range(3)]

        async def agenerate(self, *_: Any) -> list[SubQuestion]:
            return self.generate()

    def ask(use_async: bool) -> tuple[str, int]:
        begun: list[int] = []
        hook = llm.engine.model.model.layers[0].register_forward_pre_hook(lambda *_: begun.append(1))
        engine = SubQuestionQueryEngine.from_defaults(
            query_engine_tools=[tool],
            llm=llm,
            question_gen=Given(),  # type: ignore[arg-type]
            response_synthesizer=get_response_synthesizer(llm=llm),
            use_async=use_async,
            verbose=False,
        )
        with held_back(llm.engine, 3) if use_async else nullcontext():
            answer = str(engine.query(QUESTION))
        hook.remove()
        return answer, len(begun)

    alone, one_by_one = ask(use_async=False)
    found, together = ask(use_async=True)
    assert found == alone
    assert together < 0.8 * one_by_one
