"""From a task's row to a prompt in parts: chat template around it, context cut into chunks of a given size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.prompt import Prompt

_CONTEXT = "\u2063the context\u2063"


def task_prompt(example: TaskExample, tokenizer: Any, chunk_tokens: int) -> Prompt:
    """Return the example's prompt, its context cut into chunks of at most `chunk_tokens` tokens.

    The answer prefix follows the chat template's opening of the assistant's turn, once, outside the cacheable context.
    """
    head, tail = example.before, example.after
    if example.chat:
        head, tail = user_turn(tokenizer, head, tail)
    if example.glue is not None:
        chunks = list(example.context)
        return Prompt(head, chunks, tail + example.answer_prefix, query=example.query, glue=example.glue)
    chunks = join_pieces(example.context, tokenizer, chunk_tokens)
    return Prompt(head, chunks, tail + example.answer_prefix, query=example.query)


def user_turn(tokenizer: Any, before: str, after: str) -> tuple[str, str]:
    """Return what stands before and after the context when it stands between `before` and `after` in a user's turn.

    The second part ends with the opening of the assistant's turn. Without a chat template both come back as they are.
    """
    if not getattr(tokenizer, "chat_template", None):
        return before, after
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{before}{_CONTEXT}{after}"}], tokenize=False, add_generation_prompt=True
    )
    head, _, tail = rendered.partition(_CONTEXT)
    return head, tail


def prompt_length(example: TaskExample, tokenizer: Any, chunk_tokens: int) -> int:
    """Return about how many tokens the prompt has: its parts tokenised one by one, as the engine does."""
    prompt = task_prompt(example, tokenizer, chunk_tokens)
    parts = [prompt.prefix, *prompt.chunks, prompt.suffix]
    return sum(_length(part, tokenizer) for part in parts if isinstance(part, str))


def join_pieces(pieces: Sequence[str], tokenizer: Any, chunk_tokens: int) -> list[str]:
    """Join neighbouring pieces to chunks of at most `chunk_tokens` tokens; a longer piece is cut between words.

    Joined again, the chunks are the pieces joined: nothing is lost, and separators stay where they were.
    """
    chunks: list[str] = []
    current, length = "", 0
    for piece in pieces:
        for part, part_length in _cut(piece, tokenizer, chunk_tokens):
            # The sum may be off by a token where two parts meet; the exact length decides only near the limit.
            if current and length + part_length > chunk_tokens and _length(current + part, tokenizer) > chunk_tokens:
                chunks.append(current)
                current, length = "", 0
            current += part
            length += part_length
    if current.strip() or not chunks:
        chunks.append(current)
    else:
        chunks[-1] += current
    return [chunk for chunk in chunks if chunk]


def _length(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _cut(piece: str, tokenizer: Any, chunk_tokens: int) -> Iterator[tuple[str, int]]:
    length = _length(piece, tokenizer)
    if length <= chunk_tokens:
        yield piece, length
        return
    # Halves of words, not of tokens: a word is never torn apart unless it alone is too long.
    words = piece.split(" ")
    if len(words) == 1:
        middle = math.ceil(len(piece) / 2)
        halves = [piece[:middle], piece[middle:]]
    else:
        middle = math.ceil(len(words) / 2)
        halves = [" ".join(words[:middle]) + " ", " ".join(words[middle:])]
    for half in halves:
        yield from _cut(half, tokenizer, chunk_tokens)
