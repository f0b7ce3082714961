"""Constrained answers with tokenizers that are no byte-level BPE: SentencePiece kinds, as Llama 2 and Gemma have."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prophetkv_rag import Grammar, InputError, ProphetKVEngine
from tests.prompt.tokenizers import Slow
from tests.tiny import CORPUS, tiny_llama

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "number": {"enum": [1, 12, 123]}},
    "required": ["name", "number"],
}
SPECIALS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(kind: str) -> Any:
    """BPE with bytes to fall back on; spaces are a letter, and one stands before the text except in Gemma's kind."""
    built = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = normalizers.Replace(" ", "▁")
    if kind == "metaspace":
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        is_llama = kind == "llama"
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if is_llama else spaces
    if kind != "gemma":
        steps.append(decoders.Strip(" ", 1, 0))
    built.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=SPECIALS + BYTES)
    built.train_from_iterator([f'{text} {{"a": "b", "c": [1]}}' for text in CORPUS], trainer)
    state = json.loads(built.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIALS]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.mark.parametrize("kind", ["llama", "metaspace", "gemma"])
def test_answers_parse(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    model = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    engine = ProphetKVEngine(model, tokenizer)
    for seed in range(6):
        settings: dict[str, Any] = {"temperature": 2.0, "seed": seed, "max_new_tokens": 120}
        answer = engine.generate("A question.", grammar=Grammar.json_schema(SCHEMA), **settings)
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)


def test_a_slow_tokenizer_is_refused() -> None:
    engine = ProphetKVEngine(tiny_llama(), Slow())
    with pytest.raises(InputError, match="with a Slow; use a model whose tokenizer is a fast one"):
        engine.generate("A question.", grammar=Grammar.json_object())
