"""Asking a database through an unmodified LlamaIndex query engine."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prophetkv_rag.errors import ContextWindowError

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
    "remembered_tokens",
    "moved_tokens",
    "chunks",
    "timings_s",
)

_NO_ROOM = ("available context size", "is not positive")
"""What LlamaIndex's errors say when its prompt without any chunk is too long already."""


@dataclass(frozen=True, slots=True)
class Source:
    """A retrieved chunk: `score` is LlamaIndex's, exp(-cosine distance to the question), so 1 is nearest."""

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
    remember: bool | None = None,
) -> Answer:
    """Retrieve the `top_k` nearest chunks and answer from them.

    Where the chunks do not fit the context window at once, LlamaIndex asks the model several times; the report is
    then that of the last time.

    Raises:
        ContextWindowError: If the question alone is too long.
    """
    from prophetkv_rag.integrations.llama_index import ProphetKVLLM

    llm = ProphetKVLLM(
        engine=database.own_engine,
        max_new_tokens=max_new_tokens,
        strategy=strategy,
        recompute_ratio=recompute_ratio,
        remember=remember,
    )
    query_engine = database.index.as_query_engine(llm=llm, similarity_top_k=top_k)
    try:
        with redirect_stdout(sys.stderr):  # LlamaIndex prints some of its warnings
            response = query_engine.query(question)
    except ValueError as error:
        if not any(text in str(error) for text in _NO_ROOM):
            raise
        msg = (
            f"the question and an answer of {max_new_tokens} tokens leave no room for sources in the context window of "
            f"{llm.context_window} tokens; ask a shorter question or set --max-new-tokens lower"
        )
        raise ContextWindowError(msg) from error
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
