"""Event streams for clients that split lines where Python does, and not only where the format says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from openai import OpenAI

from prophetkv_rag import ProphetKVEngine
from tests.server.running import MODEL_NAME, messages, running
from tests.tiny import tiny_llama, tiny_tokenizer

BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
ANSWER = "".join(f"Line {number}.{character}" for number, character in enumerate(BREAKS)) + "\r\n\x00\x7f ä 漢 😀 End."


@contextmanager
def saying(text: str) -> Iterator[ProphetKVEngine]:
    """An engine whose model says one text, token by token."""
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    ids = [*engine.tokenizer(text, add_special_tokens=False)["input_ids"], engine.tokenizer.eos_token_id]
    said = 0

    def say(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal said
        forced = torch.full_like(output, -1e4)
        forced[..., ids[min(said, len(ids) - 1)]] = 1e4
        said += 1
        return forced

    hook = engine.model.lm_head.register_forward_hook(say)
    yield engine
    hook.remove()


def test_the_characters_are_those_that_python_splits_at() -> None:
    every = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert sorted(c for c in every if len(f"a{c}b".splitlines()) > 1) == sorted(BREAKS)


@pytest.mark.parametrize("reader", ["httpx", "openai"])
def test_every_line_break_of_an_answer_arrives(reader: str) -> None:
    with saying(ANSWER) as engine, running(engine) as server:
        text = ""
        if reader == "openai":
            with OpenAI(base_url=server.api, api_key="none", max_retries=0) as client:
                for piece in client.chat.completions.create(
                    model=MODEL_NAME, messages=messages(), stream=True, max_tokens=400
                ):
                    text += piece.choices[0].delta.content or ""
        else:
            body = server.body(stream=True, max_tokens=400)
            with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = [line for line in response.iter_lines() if line]  # splits as str.splitlines does
            assert lines.pop() == "data: [DONE]"
            for line in lines:
                assert line.startswith("data: "), line
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
    assert text == ANSWER
