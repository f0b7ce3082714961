"""What `ten_turns_ways.py` shares: questions, passages in both frameworks' stores, and what agents are made to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import chromadb
from chat_turns import QUESTIONS
from langchain_core.documents import Document
from llama_index.core import VectorStoreIndex
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode

from prophetkv_rag.integrations.langchain import ChatProphetKV, MiniLMEmbeddings, ProphetKVChroma
from prophetkv_rag.integrations.llama_index import MiniLMEmbedding, ProphetKVChromaVectorStore, ProphetKVLLM

Ask = Callable[[str], Any]
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nYou may call functions:\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Write a call as <tool_call>\n{name and arguments}\n</tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own shows no tools; this writes calls as Hermes and Qwen do."""
LATER = 1
"""Passages that an agent looks up in a later turn; in the first it fetches the context."""


class InOrder(BaseNodePostprocessor):
    """Puts the nodes in an order of their own, and not by score: then the same ones make the same context."""

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: Any = None) -> list[NodeWithScore]:
        return sorted(nodes, key=lambda found: found.node.node_id)


@dataclass
class Setting:
    """What all ways share: engines on one model, the second with a template that shows tools, and the passages.

    Half of the passages, `k`, are retrieved at a time.
    """

    engine: Any
    tool_engine: Any
    passages: list[str]
    k: int
    answer_tokens: int
    index: VectorStoreIndex = field(init=False)
    store: ProphetKVChroma = field(init=False)

    def __post_init__(self) -> None:
        client = chromadb.EphemeralClient()
        document = RelatedNodeInfo(node_id="speeches")
        nodes = [TextNode(text=text, id_=f"p{number:03}") for number, text in enumerate(self.passages)]
        for before, node in zip([None, *nodes], nodes, strict=False):
            node.relationships[NodeRelationship.SOURCE] = document
            if before is not None:
                node.relationships[NodeRelationship.PREVIOUS] = RelatedNodeInfo(node_id=before.node_id)
        vectors = ProphetKVChromaVectorStore.from_client(client, "llama-index", self.engine)
        self.index = VectorStoreIndex.from_vector_store(vectors, embed_model=MiniLMEmbedding())
        self.index.insert_nodes(nodes)
        self.store = ProphetKVChroma("langchain", MiniLMEmbeddings(), client=client, engine=self.engine)
        self.store.add_documents([Document(text, metadata={"n": n}) for n, text in enumerate(self.passages)])
        self.tool_engine.add_chunks(self.passages)

    @property
    def context(self) -> str:
        """The passages where one context is there from the first turn on."""
        return "\n\n".join(self.passages[: self.k])

    def llm(self) -> ProphetKVLLM:
        """LlamaIndex's model."""
        return ProphetKVLLM(engine=self.engine, max_new_tokens=self.answer_tokens)

    def chat_model(self) -> ChatProphetKV:
        """LangChain's."""
        return ChatProphetKV(engine=self.engine, max_tokens=self.answer_tokens)

    def searches(self) -> Callable[[int], str]:
        """Return a search that gives the next passages, as many as are asked for."""
        rest = iter(self.passages)
        return lambda count: "\n\n".join(next(rest) for _ in range(count))

    def plan(self, calls: Callable[[str, int], str], answers: Callable[[str], str], engine: Any) -> Callable[[], None]:
        """Return what writes a turn's script: one call of the tool, then an answer."""
        turns = iter(range(len(QUESTIONS)))

        def write() -> None:
            number = next(turns)
            count = LATER if number else self.k - LATER * (len(QUESTIONS) - 1)
            engine.script[:] = [calls(QUESTIONS[number], count), answers("That is what the speech says of it.")]

        return write


class FirstOf(BaseNodePostprocessor):
    """Keeps so many nodes."""

    count: int

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: Any = None) -> list[NodeWithScore]:
        return nodes[: self.count]
