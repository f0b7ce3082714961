"""Tokenizers that lack what most have, made of `tiny_tokenizer` where its vocabulary will do."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer


def tiny(kind: type[PreTrainedTokenizerFast]) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = kind
    return tokenizer


class Refusing(PreTrainedTokenizerFast):
    """As mistral-common's backend: an error for what it does not do."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("split_special_tokens") or kwargs.get("return_offsets_mapping"):
            msg = "this backend does not support `return_offsets_mapping` and `split_special_tokens`"
            raise ValueError(msg)
        return super().__call__(*args, **kwargs)


class Narrow(PreTrainedTokenizerFast):
    """Knows no arguments but one."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:  # type: ignore[override]
        return {"input_ids": super().__call__(text, add_special_tokens=add_special_tokens)["input_ids"]}


class Deaf(PreTrainedTokenizerFast):
    """Takes every argument and heeds none."""

    def __call__(self, text: str, add_special_tokens: bool = True, **ignored: Any) -> Any:  # type: ignore[override]
        return super().__call__(text, add_special_tokens=add_special_tokens)


class Uncopyable(PreTrainedTokenizerFast):
    """Holds what cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        msg = "cannot pickle '_thread.lock' object"
        raise TypeError(msg)


class Closed(Refusing):
    """Tells no vocabulary, no added tokens, and knows no empty text."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args == ("",):
            raise IndexError
        return super().__call__(*args, **kwargs)

    def get_vocab(self) -> Any:
        raise NotImplementedError

    @property
    def added_tokens_decoder(self) -> Any:
        raise NotImplementedError


class Slow(PreTrainedTokenizer):
    """Not of the Rust library, without BOS: every byte is a token, behind three special ones."""

    def __init__(self, **kwargs: Any) -> None:
        specials = {"unk_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|im_start|>"}
        super().__init__(**specials, **kwargs)
        self.chat_template = CHAT_TEMPLATE

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte for byte in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes(ord(token) for token in tokens).decode(errors="replace")


def save_tekken(directory: Path) -> Path:
    """Write a vocabulary of single bytes and two words in mistral-common's format; returns the file."""
    words = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode(errors="replace")}
        for rank, word in enumerate(words)
    ]
    config = {
        "pattern": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
        "num_vocab_tokens": len(words),
        "default_vocab_size": len(words) + 100,
        "default_num_special_tokens": 100,
        "version": "v3",
    }
    file = directory / "tekken.json"
    file.write_text(json.dumps({"config": config, "vocab": vocabulary}), encoding="utf-8")
    return file
