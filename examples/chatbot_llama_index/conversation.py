"""Conversations: LlamaIndex's context chat engine, with a bounded memory per session."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

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
    """All sessions; the longest unused ones are forgotten."""

    def __init__(self, knowledge: Knowledge, *, max_new_tokens: int = 160) -> None:
        self.knowledge = knowledge
        self.max_new_tokens = max_new_tokens
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
        return [{"role": message.role.value, "text": message.content or ""} for message in messages]

    def forget(self, wanted: str) -> None:
        """End a conversation."""
        with self._lock:
            self._sessions.pop(wanted, None)
        self.knowledge.engine.conversations.forget(wanted)

    def answer(self, session: Session, question: str, *, compare: bool, cancel: threading.Event) -> Iterator[Event]:
        """Answer a question, event by event: `sources`, `token`..., `report`, with `compare` also `comparison`, `done`.

        Setting `cancel` ends the answer within a token.

        Raises:
            InputError: If there is nothing to answer from, or the session is answering already.
        """
        if not session.lock.acquire(blocking=False):
            msg = "This conversation is still answering the question before."
            raise InputError(msg)
        try:
            engine = self.knowledge.engine
            llm = ProphetKVLLM(engine=engine, max_new_tokens=self.max_new_tokens, tenant=session.id)
            llm = llm.cancelled_by(cancel)
            chat = ContextChatEngine.from_defaults(
                retriever=self.knowledge.index.as_retriever(similarity_top_k=TOP_K),
                llm=llm,
                memory=session.memory,
                system_prompt=SYSTEM_PROMPT,
            )
            response = chat.stream_chat(question)
            sources = [_source(found) for found in response.source_nodes]
            yield {"type": "sources", "session": session.id, "sources": sources}
            view: PromptView | None = None
            for delta in response.response_gen:
                if cancel.is_set():
                    break
                yield {"type": "token", "text": delta}
                if view is None and llm.last_report is not None:  # known with the first token
                    view = llm.last_report.view
                    assert view is not None
                    yield _report_event(llm.last_report, view, sources)
            if compare and view is not None and not cancel.is_set():
                yield {"type": "comparing"}
                yield {"type": "comparison", "ttft": self._full_prefill(view)}
            yield {"type": "done"}
        finally:
            session.lock.release()

    def _full_prefill(self, view: PromptView) -> float:
        """Prefill the same token ids in full, and return how long that took."""
        prompt = Prompt(view.token_ids.tolist(), (), ())
        return self.knowledge.engine.prefill(prompt, strategy="full_prefill").report.timings_s.ttft


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


def _report_event(report: ReuseReport, view: PromptView, sources: list[dict[str, Any]]) -> Event:
    """The numbers of the report, and each source token by token."""
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
