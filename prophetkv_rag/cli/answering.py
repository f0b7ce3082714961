"""Asking a database through an unmodified LlamaIndex query engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prophetkv_rag.cli.database import Database
    from prophetkv_rag.report import ReuseReport

REPORT_KEYS = (
    "strategy",
    "recompute_ratio",
    "prompt_tokens",
    "chunk_tokens",
    "reused_tokens",
    "recomputed_tokens",
    "fresh_tokens",
    "chunks",
    "timings_s",
)


@dataclass(frozen=True, slots=True)
class Source:
    """A retrieved chunk: `score` is the cosine similarity to the question."""

    id: str
    text: str
    score: float
    file: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, the chunks it was made from, and what was reused; `report` is `None` if the model was not asked."""

    text: str
    sources: list[Source]
    report: ReuseReport | None

    def to_dict(self) -> dict[str, Any]:
        """The shape that `ask --json` prints."""
        report = None
        if self.report is not None:
            values = self.report.to_dict()
            report = {key: values[key] for key in REPORT_KEYS}
        sources = [{"id": source.id, "text": source.text, "score": source.score} for source in self.sources]
        return {"answer": self.text, "sources": sources, "report": report}


def answer_question(
    database: Database,
    question: str,
    *,
    top_k: int,
    max_new_tokens: int,
    strategy: str | None = None,
    recompute_ratio: float | None = None,
) -> Answer:
    """Retrieve the `top_k` nearest chunks and answer from them.

    Where the chunks do not fit the context window at once, LlamaIndex asks the model several times; the report is
    then that of the last time.
    """
    from prophetkv_rag.integrations.llama_index import ProphetKVLLM

    llm = ProphetKVLLM(
        engine=database.engine, max_new_tokens=max_new_tokens, strategy=strategy, recompute_ratio=recompute_ratio
    )
    response = database.index.as_query_engine(llm=llm, similarity_top_k=top_k).query(question)
    sources = [
        Source(
            id=found.node.node_id,
            text=found.node.get_content(),
            score=float(found.score or 0.0),
            file=str(found.node.metadata.get("file", "")),
        )
        for found in response.source_nodes
    ]
    return Answer(text=str(response).strip(), sources=sources, report=llm.last_report)
