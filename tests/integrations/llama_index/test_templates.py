"""Chunks encoded behind the query engine's own opening: the first chunk of its prompt is then exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from llama_index.core import ChatPromptTemplate, PromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import RichPromptTemplate

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index import ProphetKVLLM, prompt_template_of
from tests.integrations.conftest import MODEL, make_engine
from tests.integrations.rag import QUESTION, CallLog, build_index

OWN_CHAT = ChatPromptTemplate(
    [
        ChatMessage(role="system", content="Answer in one word."),
        ChatMessage(role="user", content="Facts: {context_str}\nQuestion: {query_str}"),
    ]
)
OWN_TEXT = PromptTemplate("Facts: {context_str}\nQuestion: {query_str}\nAnswer: ")


@pytest.mark.parametrize("template", [None, OWN_CHAT, OWN_TEXT], ids=["default", "messages", "text"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_the_first_chunk_of_an_unmodified_query_engine_is_exact(
    chat: bool, template: Any, new_vector_store: Any, call_log: CallLog
) -> None:
    base = make_engine(chat=chat)
    config = replace(base.config, prompt_template=prompt_template_of(base.tokenizer, template))
    engine = ProphetKVEngine(MODEL, base.tokenizer, config=config)
    index = build_index(new_vector_store(engine))
    llm = ProphetKVLLM(engine=engine, max_new_tokens=2)
    own = {} if template is None else {"text_qa_template": template}
    index.as_query_engine(llm=llm, similarity_top_k=2, **own).query(QUESTION)
    (call,) = call_log.calls
    if hasattr(call, "messages"):
        sent: Any = [{"role": message.role.value, "content": message.content} for message in call.messages]
    else:
        sent = call.prompt
    layout = engine.read(sent)
    assert len(layout.chunks) == 2
    assert layout.exact_first_chunk
    assert not base.read(sent).exact_first_chunk


def test_another_kind_of_template_is_refused() -> None:
    with pytest.raises(InputError, match="RichPromptTemplate is not supported"):
        prompt_template_of(make_engine().tokenizer, RichPromptTemplate("{{ context_str }}"))
