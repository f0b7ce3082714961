"""Conversations: LlamaIndex's context chat engine, or its agent, with a bounded memory per session."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from agent import Step, agent_steps
from knowledge import Knowledge
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.memory import ChatMemoryBuffer

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.report import PromptView, ReuseReport, SegmentView
from prophetkv_rag.text import well_formed

MAX_SESSIONS = 100
MEMORY_TOKENS = 1200
MAX_QUESTION = 2000
TOP_K = 4
SYSTEM_PROMPT = "You answer questions about the user's documents, briefly and only from the context."

Event = dict[str, Any]


@dataclass(slots=True)
class Session:
    """One conversation; `lock` is held while it answers."""

    id: str
    memory: Any = field(default_factory=lambda: ChatMemoryBuffer.from_defaults(token_limit=MEMORY_TOKENS))
    lock: threading.Lock = field(default_factory=threading.Lock)


class Conversations:
    """All sessions; the longest unused ones are forgotten.

    With `tools` the model searches the documents itself; else what is near a question stands before it.

    Raises:
        InputError: With `tools`, if the model's chat template shows none.
    """

    def __init__(self, knowledge: Knowledge, *, max_new_tokens: int = 160, tools: bool = False) -> None:
        if tools and not ProphetKVLLM(engine=knowledge.engine).supports_tools:
            msg = "this model's chat template shows no tools: leave --tools out, or take a model that calls tools"
            raise InputError(msg)
        self.knowledge = knowledge
        self.max_new_tokens = max_new_tokens
        self.tools = tools
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def session(self, wanted: str | None) -> Session:
        """Return the session of that id, or a new one under an id of ours."""
        with self._lock:
            session = self._sessions.get(wanted or "")
            if session is None:
                session = Session(secrets.token_urlsafe(16))
                self._sessions[session.id] = session
            self._sessions.move_to_end(session.id)
            while len(self._sessions) > MAX_SESSIONS:
                oldest, _ = self._sessions.popitem(last=False)
                self.knowledge.engine.conversations.forget(oldest)
            return session

    def history(self, wanted: str) -> list[dict[str, str]]:
        """Return a conversation so far; empty for one that is not known."""
        with self._lock:
            session = self._sessions.get(wanted)
        messages = session.memory.get_all() if session else []
        told = [message for message in messages if message.role.value in ("user", "assistant") and message.content]
        return [{"role": message.role.value, "text": message.content} for message in told]

    def forget(self, wanted: str) -> None:
        """End a conversation."""
        with self._lock:
            self._sessions.pop(wanted, None)
        self.knowledge.engine.conversations.forget(wanted)

    def answer(self, session: Session, question: str, *, compare: bool, cancel: threading.Event) -> Iterator[Event]:
        """Answer a question, event by event.

        `sources`, `token`..., `report`, with `compare` also `comparison`, `done`. With `tools` there are none of the
        `sources` at first, and each `call` of the model's brings more of them, and a `report` behind it.

        Setting `cancel` ends the answer within a token.

        Raises:
            InputError: If there is nothing to answer from, or the session is answering already.
        """
        if not session.lock.acquire(blocking=False):
            msg = "This conversation is still answering the question before."
            raise InputError(msg)
        try:
            llm = ProphetKVLLM(engine=self.knowledge.engine, max_new_tokens=self.max_new_tokens, tenant=session.id)
            llm = llm.cancelled_by(cancel)
            retriever = self.knowledge.index.as_retriever(similarity_top_k=TOP_K)
            steps = agent_steps if self.tools else _context_steps
            sources: list[dict[str, Any]] = []
            reported: ReuseReport | None = None
            with closing(steps(llm, retriever, session.memory, question)) as answering:
                if self.tools:
                    yield {"type": "sources", "session": session.id, "sources": []}
                for kind, given in answering:
                    if cancel.is_set():
                        break
                    if kind == "call":
                        yield {"type": "call", "name": given[0], "arguments": given[1]}
                    elif kind == "found":
                        sources = [_source(found) for found in given]
                        yield {"type": "sources", "session": session.id, "sources": sources}
                    else:
                        yield {"type": "token", "text": given}
                    if kind == "token" and reported is not llm.last_report:  # known with a call's first token
                        reported = llm.last_report
                        yield _report_event(reported, sources)
            if compare and reported is not None and not cancel.is_set():
                yield {"type": "comparing"}
                yield {"type": "comparison", "ttft": self._full_prefill(reported.view)}
            yield {"type": "done"}
        finally:
            session.lock.release()

    def _full_prefill(self, view: PromptView) -> float:
        """Prefill the same token ids in full, and return how long that took."""
        prompt = Prompt(view.token_ids.tolist(), (), ())
        return self.knowledge.engine.prefill(prompt, strategy="full_prefill").report.timings_s.ttft


def _context_steps(llm: Any, retriever: Any, memory: Any, question: str) -> Iterator[Step]:
    """Answer from what is near the question, by LlamaIndex's context chat engine."""
    chat = ContextChatEngine.from_defaults(retriever=retriever, llm=llm, memory=memory, system_prompt=SYSTEM_PROMPT)
    response = chat.stream_chat(question)
    yield "found", response.source_nodes
    for delta in response.response_gen:
        yield "token", delta


def check_question(question: str) -> str:
    """Return a question without surrounding space, or raise `InputError`."""
    question = well_formed(question).strip()
    if not question:
        msg = "The question is empty. Write what you want to know."
        raise InputError(msg)
    if len(question) > MAX_QUESTION:
        msg = f"The question has {len(question):,} characters; {MAX_QUESTION:,} is the most this chat takes."
        raise InputError(msg)
    return question


def _source(found: Any) -> dict[str, Any]:
    metadata = found.node.metadata
    return {
        "file": metadata["file"],
        "part": metadata["part"],
        "parts": metadata["chunks"],
        "text": found.node.get_content().strip(),
        "score": round(float(found.score or 0.0), 3),
    }


def _report_event(report: ReuseReport, sources: list[dict[str, Any]]) -> Event:
    """The numbers of the report, and each source token by token."""
    view = report.view
    assert view is not None
    by_text = {segment.text.strip(): segment for segment in view.segments if segment.kind == "chunk"}
    return {
        "type": "report",
        "report": report.to_dict() | {"chunks": len(report.chunks)},
        "sources": [_tokens(view, by_text.get(source["text"])) for source in sources],
    }


def _tokens(view: PromptView, segment: SegmentView | None) -> dict[str, Any] | None:
    """A source's tokens as [text, shade, recomputed, score]; `None` where it was not recognised in the prompt."""
    if segment is None:
        return None
    return {
        "status": segment.status,
        "recomputed": sum(token.recomputed for token in segment.tokens),
        "tokens": [
            [token.text, view.shade(token.score), int(token.recomputed), None if token.score is None else token.score]
            for token in segment.tokens
        ],
    }
