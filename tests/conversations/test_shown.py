"""What is seen of a conversation: in the report's numbers, its text, its view and its HTML."""

from __future__ import annotations

from prophetkv_rag import ProphetKVEngine
from tests.conversations.chats import CHUNKS, QUESTIONS, Chat, with_context
from tests.tiny import tiny_llama, tiny_tokenizer


def test_what_came_from_the_conversation_is_shown() -> None:
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    engine.add_chunks(CHUNKS)
    chat = Chat(engine)
    first = chat.ask(with_context(QUESTIONS[0])).report
    assert "remembered" not in str(first)
    assert "class=kept" not in first.to_html()
    assert "kept&quot;" not in first.to_html()
    report = chat.ask(QUESTIONS[1]).report
    assert f"= {report.remembered_tokens} remembered + 0 reused + " in str(report)
    assert "; 0/0 chunks from cache" in str(report)
    view = report.view
    assert view is not None
    statuses = [(segment.kind, segment.status) for segment in view.segments]
    assert statuses[0] == ("prefix", "remembered")
    assert statuses[-2:] == [("suffix", "remembered"), ("suffix", "fresh")]
    assert {status for kind, status in statuses if kind == "chunk"} == {"remembered"}
    kept = sum(len(segment.tokens) for segment in view.segments if segment.status == "remembered")
    assert kept == report.remembered_tokens + report.recomputed_tokens
    assert len(view.segments[-1].tokens) == report.fresh_tokens
    text = "".join(segment.text for segment in view.segments)
    assert text == engine.tokenizer.decode(view.token_ids)
    page = report.to_html()
    assert f"<b>{report.remembered_tokens} remembered</b>" in page
    assert page.count("from the conversation") == 1 + len(statuses) - 1
    assert "Earlier in the conversation" in page
