"""Messages fitted to chat templates that refuse some roles and orders, by the one function that all use."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prophetkv_rag import InputError, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.prompt.chat_template import alternate_roles, arrangements
from prophetkv_rag.prompt.tokens import Tokens
from tests.strict_templates import ALTERNATING, HISTORIES, NO_SYSTEM, ONE_CALL, STRICT_TEMPLATES, call, words_of
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer


def tokens_with(template: str) -> Tokens:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Tokens(tokenizer)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("template", STRICT_TEMPLATES)
def test_every_template_reads_all_words_of_every_history(template: str, history: str) -> None:
    messages = HISTORIES[history]
    text = tokens_with(STRICT_TEMPLATES[template]).render(messages)
    said = [word for word in words_of(messages) if template != "one_call" or word != "Let me see."]
    assert [word for word in said if word not in text] == []
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("history", HISTORIES)
def test_messages_pass_one_to_one_where_the_template_takes_them(history: str) -> None:
    tokenizer = tiny_tokenizer()
    plain = [{"role": m["role"], "content": m["content"] or ""} for m in HISTORIES[history]]
    own = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert Tokens(tokenizer).render(HISTORIES[history]) == own


def test_no_more_is_rearranged_than_the_template_demands() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}, {"role": "user", "content": "B"}]
    head = "<|im_start|>system\nS<|im_end|>\n"
    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert tokens_with(ALTERNATING).render(messages) == head + user.format("A\n\nB"), "the system message stays one"
    assert tokens_with(NO_SYSTEM).render(messages) == user.format("S\n\nA\n\nB")
    late = [*HISTORIES["late_system"][:2], {"role": "tool", "content": "T"}, *HISTORIES["late_system"][2:]]
    assert "<|im_start|>tool\nT<|im_end|>" in tokens_with(STRICT_TEMPLATES["system_first"]).render(late)


def test_calls_that_a_template_refuses_become_words() -> None:
    text = tokens_with(NO_SYSTEM).render(HISTORIES["two_calls"])
    first, second = (json.dumps({"name": "look_up", "arguments": {"what": what}}) for what in ("lighthouse", "museum"))
    assert f"<|im_start|>assistant\nLet me see.\n\n{first}\n\n{second}<|im_end|>" in text
    assert "<|im_start|>user\nIn 1862.\n\nAt ten.<|im_end|>" in text
    # Those that it takes are its own, with arguments as an object.
    called = '<|im_start|>assistant\n<call>{"name": "look_up", "arguments": {"what": "lighthouse"}}<|im_end|>'
    assert called in tokens_with(ONE_CALL).render(HISTORIES["tool"])


def test_alternate_roles_keeps_every_text() -> None:
    messages = [
        {"role": "assistant", "content": "Welcome."},
        {"role": "system", "content": "S"},
        {"role": "tool", "content": "T"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    assert alternate_roles(messages) == [
        {"role": "user", "content": "S"},
        {"role": "assistant", "content": "Welcome."},
        {"role": "user", "content": "T\n\nU"},
        {"role": "assistant", "content": "A"},
    ]
    assert messages[3] == {"role": "user", "content": "U"}, "the caller's messages are left alone"


def test_each_arrangement_is_tried_once() -> None:
    plain = [{"role": "user", "content": "Hi"}]
    assert list(arrangements(plain)) == [plain]
    tried = list(arrangements([{"role": "developer", "content": "S"}, call_turn(), *plain, *plain]))
    assert len(tried) == 5
    assert all(one not in tried[:number] for number, one in enumerate(tried))


def call_turn() -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call("f", {})]}


def test_a_template_that_takes_nothing_is_said_with_its_reason() -> None:
    tokens = tokens_with("{{ raise_exception('never') }}")
    with pytest.raises(InputError, match=r"refuses messages with the roles system, user: never"):
        tokens.render([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("template", STRICT_TEMPLATES)
def test_caches_encoded_behind_a_prompt_fit_it(template: str) -> None:
    """The encoding prefix is rendered by the same function: the first chunk stands behind exactly it."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = STRICT_TEMPLATES[template]
    asking = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Read this.\n\n{context}"},
        {"role": "user", "content": "Question: {query}"},
    ]
    engine = ProphetKVEngine(tiny_llama(), tokenizer, config=ProphetKVConfig(prompt_template=asking))
    engine.add_chunks(CORPUS[:2])
    question = "When does the museum open?"
    filled = [
        message | {"content": message["content"].format(context="\n\n".join(CORPUS[:2]), query=question)}
        for message in asking
    ]
    layout = engine.read(filled)
    assert layout.exact_first_chunk
    assert [chunk.key for chunk in layout.chunks] == engine.add_chunks(CORPUS[:2])
    assert [chunk.status for chunk in engine.prefill(filled).report.chunks] == ["hit", "hit"]
    # Ratio 1.0 is full prefill, whatever was rearranged.
    whole, full = engine.prefill(filled, recompute_ratio=1.0), engine.prefill(filled, strategy="full_prefill")
    assert whole.input_ids.equal(full.input_ids)
    assert whole.logits.allclose(full.logits, atol=1e-4)
    # The user's own last words ask, not what a template had them joined with.
    asked = engine.tokenizer.decode(layout.input_ids[list(layout.question_rows)])
    assert asked.strip() == f"Question: {question}"


def test_a_tools_answer_does_not_become_the_question() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    engine = ProphetKVEngine(tiny_llama(), tokenizer)
    engine.add_chunks(CORPUS[:1])
    messages = [*HISTORIES["tool"][:2], {"role": "tool", "content": f"{CORPUS[0]}\n\nSource: a book."}]
    layout = engine.read(messages)
    assert len(layout.chunks) == 1
    assert engine.tokenizer.decode(layout.probe_ids) == "When?"
