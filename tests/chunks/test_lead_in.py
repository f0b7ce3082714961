"""The lead-in: what chunks are encoded behind changes their caches and keys, and nothing about what is exact."""

from __future__ import annotations

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.config import LEAD_IN_TOKENS
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

CHUNKS = [text_of(30, seed=1), text_of(30, seed=2)]
LEAD_IN = text_of(60, seed=3)


def engine_of(**settings):
    return ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(**settings))


def test_it_stands_behind_the_default_prefix():
    plain, led = engine_of(), engine_of(lead_in=LEAD_IN)
    count = len(plain.identity.prefix_ids)
    assert led.identity.prefix_ids[:count] == plain.identity.prefix_ids
    ids = tuple(tiny_tokenizer()(LEAD_IN, add_special_tokens=False)["input_ids"])
    assert led.identity.prefix_ids[count:] == ids[: min(LEAD_IN_TOKENS, led.context_window // 8)]
    assert len(ids) > 20
    # Caches made behind another lead-in are other caches.
    assert led.identity.key([1, 2]) != plain.identity.key([1, 2])
    assert led.identity.key([1, 2]) != engine_of(lead_in=text_of(60, seed=4)).identity.key([1, 2])


def test_a_long_one_is_cut_and_leaves_a_short_window_to_the_chunks():
    count = len(engine_of().identity.prefix_ids)
    long = text_of(3000, seed=5)
    assert len(engine_of(lead_in=long).identity.prefix_ids) == count + LEAD_IN_TOKENS
    assert len(engine_of(lead_in=long, lead_in_tokens=100).identity.prefix_ids) == count + 100
    short = engine_of(lead_in=long, max_prompt_tokens=400)
    assert len(short.identity.prefix_ids) == count + 50


def test_special_tokens_in_it_stay_text():
    plain, led = engine_of(), engine_of(lead_in="a <|im_end|> b")
    assert len(led.identity.prefix_ids) > len(plain.identity.prefix_ids) + 5
    assert led.tokenizer.eos_token_id not in led.identity.prefix_ids[len(plain.identity.prefix_ids) :]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Read {context_str}, then answer {query_str}."},
]


@pytest.mark.parametrize("template", [MESSAGES, tuple(MESSAGES), "Be brief.<|im_end|>Read {context} and {question}"])
def test_chunks_stand_behind_the_opening_of_the_applications_prompt(template):
    engine = engine_of(prompt_template=template)
    chunk, question = text_of(30, seed=1), "Why?"
    engine.add_chunks([chunk])
    if isinstance(template, str):
        prompt = template.replace("{context}", chunk).replace("{question}", question)
    else:
        prompt = [
            message | {"content": message["content"].replace("{context_str}", chunk).replace("{query_str}", question)}
            for message in template
        ]
    # The first chunk of such a prompt follows exactly what it was encoded behind: reuse is exact.
    assert engine.read(prompt).exact_first_chunk
    full = engine.prefill(prompt, strategy="full_prefill")
    reused = engine.prefill(prompt, strategy="full_reuse")
    assert reused.report.reused_tokens > 0
    torch.testing.assert_close(reused.logits, full.logits, atol=1e-4, rtol=1e-4)
    led = engine_of(prompt_template=template, lead_in=LEAD_IN)
    assert led.identity.prefix_ids[: len(engine.identity.prefix_ids)] == engine.identity.prefix_ids
    assert len(led.identity.prefix_ids) > len(engine.identity.prefix_ids) + 20


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Answer {question}", "no {context} placeholder"),
        ([{"role": "user", "content": "hi"}], "no {context} placeholder"),
        ([], "no {context} placeholder"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "user", "content": "{context}"}, {"role": "user", "content": None}], "'role' and 'content'"),
        (5, "'role' and 'content'"),
    ],
)
def test_a_template_that_says_nothing_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        ProphetKVConfig(prompt_template=template)


def test_a_given_encoding_prefix_is_all_there_is():
    assert engine_of(encoding_prefix=(5, 6), lead_in=LEAD_IN, prompt_template=MESSAGES).identity.prefix_ids == (5, 6)
    no_tokenizer = ProphetKVEngine(tiny_llama(), None, config=ProphetKVConfig(lead_in=LEAD_IN))
    assert no_tokenizer.identity.prefix_ids == ()


@pytest.mark.parametrize("prefix", ["", "Context:\n"])
def test_ratio_one_is_full_prefill_and_the_lead_in_is_not_in_the_prompt(prefix):
    engine = engine_of(lead_in=LEAD_IN)
    engine.add_chunks(CHUNKS)
    prompt = Prompt(prefix, CHUNKS, "\nWhy?")
    full = engine.prefill(prompt, strategy="full_prefill")
    ours = engine.prefill(prompt, recompute_ratio=1.0)
    assert torch.equal(full.input_ids, ours.input_ids)
    assert LEAD_IN[:40] not in engine.tokenizer.decode(full.input_ids[0])
    torch.testing.assert_close(ours.logits, full.logits, atol=1e-4, rtol=1e-4)


def test_a_chunk_behind_prefix_and_lead_in_is_exact():
    engine = engine_of(lead_in=LEAD_IN)
    engine.add_chunks(CHUNKS[:1])
    prompt = Prompt(engine.identity.prefix_ids, CHUNKS[:1], "\nWhy?")
    full = engine.prefill(prompt, strategy="full_prefill")
    reused = engine.prefill(prompt, strategy="full_reuse")
    torch.testing.assert_close(reused.logits, full.logits, atol=1e-4, rtol=1e-4)
    assert engine.read(prompt).exact_first_chunk
    assert not engine.read(Prompt(engine_of().identity.prefix_ids, CHUNKS[:1], "\nWhy?")).exact_first_chunk
