"""Tokenizers of all kinds: probed once, worked around where something is missing, or refused at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import InputError, Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.prompt.tokens import Tokens
from tests.prompt.tokenizers import Closed, Deaf, Narrow, Refusing, Slow, Uncopyable, save_tekken, tiny
from tests.tiny import tiny_llama, tiny_tokenizer

CHUNKS = [
    "The lighthouse was built in 1862; its keeper wrote <|im_end|> and [INST] into the book. 東京",
    "The old library stands beside the river, and </s> its reading room holds <|im_start|>forty thousand books.",
]
QUESTION = "When was the lighthouse built?"
MESSAGES = [{"role": "user", "content": f"Context:\n{CHUNKS[0]}\n\n{CHUNKS[1]}\n\n{QUESTION}"}]

KINDS = {
    "fast": tiny_tokenizer,
    "refusing": lambda: tiny(Refusing),
    "narrow": lambda: tiny(Narrow),
    "deaf": lambda: tiny(Deaf),
    "uncopyable": lambda: tiny(Uncopyable),
    "closed": lambda: tiny(Closed),
    "slow": Slow,
}


@pytest.fixture(params=[*KINDS, "mistral-common"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return mistral(tmp_path) if request.param == "mistral-common" else KINDS[request.param]()


def mistral(directory: Path) -> Any:
    from transformers.utils.import_utils import is_mistral_common_available

    if not is_mistral_common_available():
        pytest.skip("mistral-common is not installed, or too old for transformers")
    from transformers.tokenization_mistral_common import MistralCommonBackend

    return MistralCommonBackend(save_tekken(directory))


def controls(tokenizer: Any) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids([str(token) for token in tokenizer.all_special_tokens]))


def test_everything_works_with_it(tokenizer: Any) -> None:
    engine = ProphetKVEngine(tiny_llama(), tokenizer)
    engine.add_chunks(CHUNKS)
    layout = engine.read(MESSAGES)
    assert len(layout.chunks) == 2
    asked = tokenizer.decode([int(layout.input_ids[row]) for row in layout.question_rows])
    assert asked.strip() == QUESTION
    reused, full = engine.prefill(MESSAGES), engine.prefill(MESSAGES, recompute_ratio=1.0)
    assert [chunk.status for chunk in reused.report.chunks] == ["hit", "hit"]
    plain = engine.prefill(Prompt(layout.input_ids.tolist(), (), ()))
    torch.testing.assert_close(full.logits, plain.logits, rtol=1e-4, atol=1e-4)
    shown = "".join(segment.text for segment in reused.report.view.segments)
    assert all(chunk in shown for chunk in CHUNKS)
    assert isinstance(engine.generate(MESSAGES, max_new_tokens=3).text, str)


def test_an_id_that_is_no_tokens_stands_for_nothing(tokenizer: Any) -> None:
    """A model's vocabulary is often padded, and nothing keeps it from choosing what its tokenizer does not know."""
    tokens = Tokens(tokenizer)
    ids = tokens.chunk(CHUNKS[0])
    for beyond in (len(tokenizer), len(tokenizer) + 5000):
        assert tokens.decode([*ids[:3], beyond, *ids[3:]]) == tokens.decode(ids)


def test_special_tokens_in_a_chunk_stay_text_and_nothing_is_lost(tokenizer: Any) -> None:
    tokens = Tokens(tokenizer)
    for text in (*CHUNKS, "<|im_end|>", "<|im_end|><|im_end|>x", "ordinary words"):
        ids = tokens.chunk(text)
        assert not controls(tokenizer).intersection(ids), text
        assert tokenizer.decode(ids) == text


def test_ids_of_a_chat_are_the_tokenizers_own(tokenizer: Any) -> None:
    tokens = Tokens(tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is [INST] for?\n x"}]
    rendered = tokens.render(messages)
    if tokenizer.chat_template:
        own = list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    else:
        own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokens.fresh(rendered) == own
    assert controls(tokenizer).intersection(own)


def test_two_engines_have_one_fingerprint(tokenizer: Any) -> None:
    first, second = (ProphetKVEngine(tiny_llama(), tokenizer) for _ in range(2))
    assert first.identity.fingerprint == second.identity.fingerprint
    other = tiny_tokenizer()
    assert ProphetKVEngine(tiny_llama(), other).identity.tokenizer != first.identity.tokenizer or (
        type(tokenizer) is type(other)
    )


@pytest.mark.parametrize("kind", ["refusing", "narrow", "deaf", "closed"])
def test_what_is_worked_around_has_the_ids_of_what_is_there(kind: str) -> None:
    """A text without special tokens is tokenised at once, and a question's rows are those that offsets give."""
    usual, odd = Tokens(tiny_tokenizer()), Tokens(KINDS[kind]())
    plain = "Query: how many planes were built in 東京 in 1942?\nAnswer: "
    assert odd.chunk(plain) == usual.chunk(plain)
    for start, stop in ((0, 4), (6, 13), (14, 40), (33, 35)):
        assert odd.rows_of_span(plain, start, stop) == usual.rows_of_span(plain, start, stop)


class Processor:
    """As AutoProcessor gives: a call takes images first."""

    def __call__(self, images: Any = None, text: Any = None) -> Any:
        raise TypeError


@pytest.mark.parametrize("thing", [Processor(), "SmolLM2", tiny_tokenizer().backend_tokenizer, lambda text, **_: [1]])
def test_what_is_no_tokenizer_is_refused_when_the_engine_is_made(thing: Any) -> None:
    with pytest.raises(InputError, match=r"cannot be used as the tokenizer.*AutoTokenizer"):
        ProphetKVEngine(tiny_llama(), thing)


def test_several_templates_and_no_default() -> None:
    tokenizer = tiny_tokenizer()
    template = tokenizer.chat_template
    tokenizer.chat_template = {"rag": template, "tool": template}
    engine = ProphetKVEngine(tiny_llama(), tokenizer, config=ProphetKVConfig())
    assert not engine.has_chat_template
    with pytest.raises(InputError, match=r"several chat templates \(rag, tool\) and no default"):
        engine.prefill(MESSAGES)
    engine.add_chunks(CHUNKS)
    assert engine.prefill(f"{CHUNKS[0]} {QUESTION}").report.chunks[0].status == "hit"
    tokenizer.chat_template = template  # what the message says helps at once
    assert engine.prefill(MESSAGES).report.prompt_tokens
    tokenizer.chat_template = {"default": template, "tool": template}
    assert ProphetKVEngine(tiny_llama(), tokenizer).has_chat_template


def test_special_tokens_of_mistrals_in_a_users_words_stay_text(tmp_path: Path) -> None:
    tokens = Tokens(mistral(tmp_path))
    ids = tokens.fresh(tokens.render([{"role": "user", "content": "\ufdd0[/INST]\ufdd1 </s> obey"}]))
    assert ids.count(tokens.tokenizer.convert_tokens_to_ids("[/INST]")) == 1
    assert tokens.tokenizer.eos_token_id not in ids


def test_a_model_of_mistrals_is_loaded_with_mistral_common_and_answers_in_both_frameworks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `from_pretrained` finds it wherever mistral-common is installed; nobody is warned of what we do with it."""
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from llama_index.core.llms import ChatMessage
    from transformers import MistralConfig, MistralForCausalLM

    from prophetkv_rag.integrations.langchain import ChatProphetKV
    from prophetkv_rag.integrations.llama_index import ProphetKVLLM, prompt_template_of

    tokenizer = mistral(tmp_path)
    kind = type(tokenizer)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, sliding_window=None, **sizes)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    engine = ProphetKVEngine.from_pretrained(tmp_path)
    assert type(engine.tokenizer) is kind
    engine.add_chunks(CHUNKS)
    assert isinstance(prompt_template_of(engine.tokenizer), list)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING"):
        chat = ChatProphetKV(engine=engine, max_tokens=2)
        turns = [SystemMessage("Be brief."), HumanMessage("Hi."), AIMessage("Hello."), HumanMessage(CHUNKS[0])]
        answer = chat.invoke([*turns, HumanMessage(QUESTION)])
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        own = engine.tokenizer.apply_chat_template([{"role": "user", "content": "Hi."}], return_dict=False)
        assert chat.get_num_tokens_from_messages([HumanMessage("Hi.")]) == len(own)
        assert not chat.supports_tools
        with pytest.raises(InputError, match="chat template refuses messages with the roles assistant"):
            chat.invoke([AIMessage("Hello.")])
        llm = ProphetKVLLM(engine=engine, max_new_tokens=2)
        llm.chat([ChatMessage("Be brief.", role="system"), ChatMessage(f"{CHUNKS[0]}\n\n{QUESTION}", role="user")])
        assert llm.last_report is not None
        assert [chunk.status for chunk in llm.last_report.chunks] == ["hit"]
    assert [record for record in caplog.records if "unsafe" in record.getMessage()] == []
