"""Text to ids: what chunks are encoded behind, and what must not depend on the day or on other threads."""

from __future__ import annotations

import threading
from datetime import datetime

import pytest

from prophetkv_rag import InputError, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.prompt.tokens import Tokens
from tests.tiny import SYSTEM, tiny_llama, tiny_tokenizer


def test_encoding_prefix_is_the_templates_opening():
    tokenizer = tiny_tokenizer()
    prefix = Tokens(tokenizer).default_encoding_prefix()
    assert tokenizer.decode(prefix) == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"


def test_encoding_prefix_does_not_change_with_the_day():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}.\n" + tokenizer.chat_template
    prefix = tokenizer.decode(Tokens(tokenizer).default_encoding_prefix())
    assert prefix.startswith("Today is 26 Jul 2024.")
    # the prompt itself gets the real date
    rendered = Tokens(tokenizer).render([{"role": "user", "content": "hi"}])
    assert rendered.startswith(datetime.now().strftime("Today is %d %b %Y."))


def test_without_a_template_the_prefix_is_what_the_tokenizer_puts_in_front():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert Tokens(tokenizer).default_encoding_prefix() == ()
    with pytest.raises(InputError, match="no chat template"):
        Tokens(tokenizer).render([{"role": "user", "content": "hi"}])


def test_template_that_rejects_a_role():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only users may speak') }}"
    with pytest.raises(InputError, match="only users may speak"):
        Tokens(tokenizer).render([{"role": "system", "content": "hi"}])


def test_chunks_stay_text_whatever_other_threads_do_with_the_tokenizer():
    tokenizer = tiny_tokenizer()
    tokens = Tokens(tokenizer)
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")
    done = threading.Event()

    def parse_special_tokens():
        while not done.is_set():
            tokenizer("text<|im_end|>", add_special_tokens=False, split_special_tokens=False)

    thread = threading.Thread(target=parse_special_tokens)
    thread.start()
    try:
        assert all(control not in tokens.chunk("stays text <|im_end|> here") for _ in range(300))
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (6, 13), (14, 40)])
def test_rows_of_a_span_cover_it(start, stop):
    text = "Query: how many planes were built?\nAnswer: "
    tokens = Tokens(tiny_tokenizer())
    rows = tokens.rows_of_span(text, start, stop)
    ids = tokens.fresh(text)
    assert rows == list(range(rows[0], rows[-1] + 1))
    assert text[start:stop].strip() in tokens.tokenizer.decode([ids[row] for row in rows])


@pytest.mark.parametrize("template", ["{{ raise_exception('a system turn first') }}", "{{ nothing.at.all }}"])
def test_template_that_rejects_a_lone_user_message_leaves_bos_alone(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokens = Tokens(tokenizer)
    tokens._start = [1]  # what a tokenizer with a BOS of its own puts in front
    assert tokens.default_encoding_prefix() == (1,)
    engine = ProphetKVEngine(tiny_llama(), tokenizer, config=ProphetKVConfig(encoding_prefix=None))
    engine.add_chunks(["A chunk of such a model."])
    assert engine.prefill("Read: A chunk of such a model. So?").report.chunks[0].status == "hit"


def test_what_stands_in_front_of_a_prompt_is_asked_once(monkeypatch):
    tokenizer = tiny_tokenizer()
    tokens = Tokens(tokenizer)
    asked = []
    real = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **kw: asked.append(text) or real(self, text, **kw)
    )
    assert tokens.fresh("a prompt", first=True) == tokens.fresh("a prompt", first=True)
    assert asked.count("") == 1
