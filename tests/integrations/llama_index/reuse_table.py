"""The rows of the table in docs/llama_index.md: how each engine is called, and why its figures are what they are."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from llama_index.core import Document, SummaryIndex, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceWindowNodeParser
from llama_index.core.postprocessor import LLMRerank, LongContextReorder, MetadataReplacementPostProcessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import (
    CitationQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.core.selectors import LLMMultiSelector, LLMSingleSelector
from llama_index.core.tools import QueryEngineTool, RetrieverTool

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.integrations.llama_index import (
    AlteredTextCache,
    ProphetKVLLM,
    ProphetKVSynthesizer,
    ReuseReportEvent,
)
from tests.integrations.rag import QUESTION, TEXTS, HashingEmbedding, chunk_key
from tests.integrations.scripted import ScriptedLLM
from tests.integrations.taught import TOOL_TEMPLATE

TOP_K = 3


class Opening(BaseModel):
    """When a place opens."""

    place: str
    opens_at: str


class LastHalf(BaseNodePostprocessor):
    """Keeps the second half of every text, as a compressor might."""

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: Any = None) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=TextNode(text=item.node.get_content(metadata_mode=MetadataMode.NONE)[40:], id_=item.node.node_id),
                score=item.score,
            )
            for item in nodes
        ]


@dataclass
class Town:
    """What a row works on."""

    engine: ProphetKVEngine
    index: VectorStoreIndex
    new_index: Callable[..., VectorStoreIndex]
    llm: ProphetKVLLM = field(init=False)

    def __post_init__(self) -> None:
        self.llm = ScriptedLLM(engine=self.engine, max_new_tokens=8)

    def tool(self) -> QueryEngineTool:
        return QueryEngineTool.from_defaults(self.query_engine(), name="town", description="About the town.")

    def query_engine(self, **options: Any) -> Any:
        return self.index.as_query_engine(llm=self.llm, similarity_top_k=TOP_K, **options)

    def chat(self, mode: str) -> None:
        memory = ChatMemoryBuffer.from_defaults(token_limit=3000)
        options = {} if mode == "simple" else {"similarity_top_k": TOP_K}
        engine = self.index.as_chat_engine(chat_mode=mode, llm=self.llm, memory=memory, **options)
        engine.chat(QUESTION)
        engine.chat("And on Sunday?")

    def agent(self, tool: Any, kind: str = "ReActAgent") -> None:
        if kind != "ReActAgent":
            self.engine.tokenizer.chat_template = TOOL_TEMPLATE
        agent: Any = (ReActAgent if kind == "ReActAgent" else FunctionAgent)(tools=[tool], llm=self.llm)
        if kind == "AgentWorkflow":
            agent = AgentWorkflow(agents=[agent], root_agent=agent.name)

        async def talk() -> None:
            await agent.run(QUESTION)

        asyncio.run(talk())

    def sentence_windows(self) -> Any:
        def sentences(text: str) -> list[str]:
            return re.findall(r"[^;,:]+[;,:.]?\s*", text)

        parser = SentenceWindowNodeParser.from_defaults(window_size=1, sentence_splitter=sentences)
        nodes = parser.get_nodes_from_documents([Document(text=text) for text in TEXTS])
        return self.new_index(self.engine, nodes).as_query_engine(
            llm=self.llm, similarity_top_k=TOP_K, node_postprocessors=[MetadataReplacementPostProcessor("window")]
        )

    def summary_index(self) -> Any:
        index = SummaryIndex([TextNode(text=text.upper()) for text in TEXTS])
        return index.as_query_engine(llm=self.llm)


@dataclass(frozen=True)
class Row:
    """`run` makes a function that asks once.

    `warm` asks once before; `altered` counts the texts that the synthesizer gets, not the retriever's; `listens` keeps
    an `AlteredTextCache` open meanwhile.
    """

    name: str
    run: Callable[[Town], Callable[[], Any]]
    why: str
    warm: bool = False
    altered: bool = False
    listens: bool = False


def ask(make: Callable[[Town], Any], question: str = QUESTION) -> Callable[[Town], Callable[[], Any]]:
    def prepare(town: Town) -> Callable[[], Any]:
        engine = make(town)
        return lambda: engine.query(question)

    return prepare


def mode(name: str) -> Callable[[Town], Callable[[], Any]]:
    return ask(lambda town: town.query_engine(response_mode=name))


def router(selector: Any) -> Callable[[Town], Callable[[], Any]]:
    def make(town: Town) -> Any:
        other = QueryEngineTool.from_defaults(town.query_engine(), name="other", description="About anything else.")
        return RouterQueryEngine.from_defaults(
            [town.tool(), other], llm=town.llm, selector=selector.from_defaults(llm=town.llm)
        )

    return ask(make)


def sub_questions(town: Town) -> Any:
    return SubQuestionQueryEngine.from_defaults(
        [town.tool()],
        llm=town.llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm=town.llm),
        verbose=False,
        use_async=False,
    )


def small_window(town: Town) -> Any:
    town.llm = ScriptedLLM(engine=town.engine, max_new_tokens=8, context_window=680)
    return town.query_engine()


def fusion(town: Town) -> Any:
    retriever = QueryFusionRetriever(
        [town.index.as_retriever(similarity_top_k=TOP_K)], llm=town.llm, num_queries=3, use_async=False
    )
    return RetrieverQueryEngine.from_args(retriever, llm=town.llm)


def held_nodes(is_indexed: bool) -> Callable[[Town], Callable[[], Any]]:
    def prepare(town: Town) -> Callable[[], Any]:
        texts = [text if is_indexed else text.upper() for text in TEXTS]
        nodes = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in texts]
        synthesizer = ProphetKVSynthesizer(town.llm)
        return lambda: synthesizer.synthesize(QUESTION, nodes)

    return prepare


def retriever_tool(town: Town) -> Any:
    return RetrieverTool.from_defaults(
        town.index.as_retriever(similarity_top_k=TOP_K), name="town", description="About the town."
    )


IN_ONE = "all chunks in one prompt"
ROWS = [
    Row("query engine, `compact` (the default)", mode("compact"), IN_ONE),
    Row("query engine, `refine`", mode("refine"), "one prompt a chunk"),
    Row("query engine, `tree_summarize`", mode("tree_summarize"), IN_ONE),
    Row("query engine, `simple_summarize`", mode("simple_summarize"), IN_ONE),
    Row("query engine, `accumulate`", mode("accumulate"), "one prompt a chunk"),
    Row("query engine, `compact_accumulate`", mode("compact_accumulate"), IN_ONE),
    Row(
        "query engine, `output_cls=` (structured output)",
        ask(lambda town: town.query_engine(output_cls=Opening)),
        "the schema follows the question and is prefilled",
    ),
    Row(
        "`CitationQueryEngine`",
        ask(lambda town: CitationQueryEngine.from_args(town.index, llm=town.llm, similarity_top_k=TOP_K)),
        "`Source 1:` and the like stand between the chunks",
    ),
    Row(
        "`CitationQueryEngine`, `citation_chunk_size` below the chunks' size",
        ask(
            lambda town: CitationQueryEngine.from_args(
                town.index, llm=town.llm, similarity_top_k=TOP_K, citation_chunk_size=10, citation_chunk_overlap=0
            )
        ),
        "it splits the chunks again: give it the index's chunk size",
    ),
    Row("`RouterQueryEngine`, one choice", router(LLMSingleSelector), "choosing needs a call without chunks"),
    Row(
        "`RouterQueryEngine`, several choices",
        router(LLMMultiSelector),
        "nor does the call that joins the answers hold chunks",
    ),
    Row(
        "`SubQuestionQueryEngine`",
        ask(sub_questions),
        "every sub-question's chunks; not the call that asks them, nor the one that joins their answers",
    ),
    Row(
        "`TransformQueryEngine` with HyDE",
        ask(lambda town: TransformQueryEngine(town.query_engine(), HyDEQueryTransform(llm=town.llm))),
        "the invented passage is written by a call without chunks",
    ),
    Row("`QueryFusionRetriever`", ask(fusion), "more questions are written by a call without chunks"),
    Row(
        "reranker that reorders (`LongContextReorder`)",
        ask(lambda town: town.query_engine(node_postprocessors=[LongContextReorder()])),
        "chunks may stand in any order",
    ),
    Row(
        "`LLMRerank`",
        ask(lambda town: town.query_engine(node_postprocessors=[LLMRerank(llm=town.llm, top_n=2)])),
        "the reranking prompt holds the chunks too",
    ),
    Row(
        "sentence windows",
        ask(Town.sentence_windows),
        "sentences are found one by one, but a window is not one chunk",
        altered=True,
    ),
    Row(
        "sentence windows, `AlteredTextCache` open, second time",
        ask(Town.sentence_windows),
        "each window is one chunk",
        altered=True,
        warm=True,
        listens=True,
    ),
    Row(
        "postprocessor that shortens texts",
        ask(lambda town: town.query_engine(node_postprocessors=[LastHalf()])),
        "the texts were never indexed",
        altered=True,
    ),
    Row(
        "postprocessor that shortens texts, `AlteredTextCache` open, second time",
        ask(lambda town: town.query_engine(node_postprocessors=[LastHalf()])),
        "the first time computes and keeps them",
        altered=True,
        warm=True,
        listens=True,
    ),
    Row("`SummaryIndex`", ask(Town.summary_index), "its nodes are in no vector store", altered=True),
    Row(
        "`SummaryIndex`, `AlteredTextCache` open, second time",
        ask(Town.summary_index),
        "the first time computes and keeps them",
        altered=True,
        warm=True,
        listens=True,
    ),
    Row(
        "query engine, window too small for the chunks",
        ask(small_window),
        "LlamaIndex cuts the texts to fit; what is cut is prefilled",
    ),
    Row(
        "`ProphetKVSynthesizer`, indexed nodes",
        held_nodes(is_indexed=True),
        "the nodes say where the chunks are",
        altered=True,
    ),
    Row(
        "`ProphetKVSynthesizer`, other nodes",
        held_nodes(is_indexed=False),
        "caches are computed for this prompt and not kept",
        altered=True,
    ),
    Row("chat engine, `context`", lambda town: lambda: town.chat("context"), "every turn retrieves"),
    Row(
        "chat engine, `condense_question`",
        lambda town: lambda: town.chat("condense_question"),
        "a turn after the first begins with a call that rewrites the question",
    ),
    Row(
        "chat engine, `condense_plus_context`",
        lambda town: lambda: town.chat("condense_plus_context"),
        "a turn after the first begins with a call that rewrites the question",
    ),
    Row("chat engine, `simple`", lambda town: lambda: town.chat("simple"), "it retrieves nothing"),
    Row(
        "`ReActAgent` with a query-engine tool",
        lambda town: lambda: town.agent(town.tool()),
        "the tool's own call; the agent's calls hold the tool's answer, not its chunks",
    ),
    Row(
        "`ReActAgent` with a retriever tool",
        lambda town: lambda: town.agent(retriever_tool(town)),
        "the call after the tool's; the first has no chunks yet",
    ),
    Row(
        "`FunctionAgent` with a query-engine tool",
        lambda town: lambda: town.agent(town.tool(), "FunctionAgent"),
        "the tool's own call; the agent's calls hold the tool's answer, not its chunks",
    ),
    Row(
        "`FunctionAgent` with a retriever tool",
        lambda town: lambda: town.agent(retriever_tool(town), "FunctionAgent"),
        "the call after the tool's; the first has no chunks yet",
    ),
    Row(
        "`AgentWorkflow` with a retriever tool",
        lambda town: lambda: town.agent(retriever_tool(town), "AgentWorkflow"),
        "likewise",
    ),
]


class Meter(BaseEventHandler):
    """Collects what one row did: reports of calls, retrieved texts, and texts at synthesis."""

    reports: list[dict[str, Any]] = Field(default_factory=list)
    retrieved: list[str] = Field(default_factory=list)
    synthesised: list[str] = Field(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, ReuseReportEvent):
            self.reports.append(event.report)
        if isinstance(event, RetrievalEndEvent):
            self.retrieved += [item.node.get_content(metadata_mode=MetadataMode.NONE) for item in event.nodes]
        if isinstance(event, SynthesizeEndEvent):
            self.synthesised += [
                item.node.get_content(metadata_mode=MetadataMode.NONE) for item in event.response.source_nodes
            ]


def measure(row: Row, town: Town, meter: Meter) -> tuple[str, str]:
    """Run a row; returns the verdict and `calls with reused chunks of calls`.

    "fully": every text is reused as a chunk and every call holds some. "not": nothing is reused. Else "partly".
    """
    with AlteredTextCache(town.llm) if row.listens else nullcontext():
        run = row.run(town)
        if row.warm:
            run()
            for found in (meter.reports, meter.retrieved, meter.synthesised):
                found.clear()
        run()
    hits = [{chunk["key"] for chunk in report["chunks"] if chunk["status"] == "hit"} for report in meter.reports]
    wanted = {chunk_key(town.engine, text) for text in (meter.synthesised if row.altered else meter.retrieved)}
    reused = set().union(*hits)
    verdict = "fully" if wanted and wanted <= reused and all(hits) else "partly" if reused else "not"
    return verdict, f"{sum(map(bool, hits))} of {len(hits)}"


def new_index(store: Any, nodes: list[Any]) -> VectorStoreIndex:
    index = VectorStoreIndex.from_vector_store(store, embed_model=HashingEmbedding())
    index.insert_nodes(nodes)
    return index
