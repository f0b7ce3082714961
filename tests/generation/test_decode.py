"""The decode loop's text: what may be shown while a character or a stop string is still incomplete."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from prophetkv_rag.generation.decode import StreamChunk, decode_tokens
from prophetkv_rag.generation.interrupt import InterruptibleLock
from prophetkv_rag.generation.sampling import SamplingSettings
from prophetkv_rag.generation.steps import Steps

END = 0


def byte_fallback(token_ids: Sequence[int]) -> str:
    """Tokens are bytes; a character that is not complete yet shows one U+FFFD for each of its bytes, as Llama 2's."""
    data = bytes(token - 1 for token in token_ids)
    for pending in range(4):
        try:
            return data[: len(data) - pending].decode() + "\ufffd" * pending
        except UnicodeDecodeError:
            continue
    return data.decode(errors="replace")


def pieces(data: bytes, *, stop: tuple[str, ...] = (), max_new_tokens: int = 100) -> list[StreamChunk]:
    """Stream an answer of these bytes, one token each."""
    answer = [byte + 1 for byte in data] + [END]

    def logits_at(step: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([answer[step]]), 300).float()

    def model(input_ids: torch.Tensor, past_key_values: list[int], **options: Any) -> Any:
        past_key_values.append(1)
        return SimpleNamespace(logits=logits_at(len(past_key_values))[:, None])

    stream = decode_tokens(
        Steps(model, [], InterruptibleLock(threading.RLock()), lambda: None),
        torch.tensor([[5]]),
        logits_at(0),
        SamplingSettings(stop=stop, max_new_tokens=max_new_tokens),
        end_tokens=frozenset([END]),
        to_text=byte_fallback,
        report=cast(Any, None),
    )
    return list(stream)


@pytest.mark.parametrize(
    "text",
    ["na\u00efve \u6771\u4eac \U0001f680\U0001f680 done", "\U0001f680", "ends with \ufffd", "\ufffd\ufffd and on"],
)
def test_pieces_join_to_the_text_whatever_is_pending(text: str) -> None:
    found = pieces(text.encode())
    assert "".join(piece.delta for piece in found) == found[-1].text == text
    for piece in found[:-1]:
        assert text.startswith(piece.text)


def test_an_answer_that_is_cut_inside_a_character_shows_what_came() -> None:
    found = pieces("a\U0001f680".encode(), max_new_tokens=3)
    assert "".join(piece.delta for piece in found) == found[-1].text == "a\ufffd\ufffd"
    assert found[-1].finish_reason == "length"


def test_stop_strings_and_pending_characters() -> None:
    found = pieces("\u6771 stop here".encode(), stop=("\u4eac", "stop"))
    assert "".join(piece.delta for piece in found) == "\u6771 "
    assert found[-1].finish_reason == "stop"
