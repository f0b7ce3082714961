"""Where a prompt asks: the user's own words among messages, and a question's tokens among others."""

from __future__ import annotations

from collections.abc import Sequence

from prophetkv_rag.prompt.chunk_index import ChunkIndex
from prophetkv_rag.prompt.prompt import Message


def question_of(messages: Sequence[Message], chunk_index: ChunkIndex) -> str | None:
    """Return the last user message's own words: what follows its last chunk, or all of it if it holds none.

    In agents the retrieved chunks come after the question, as a tool's answer; then the suffix holds no question
    at all and this one asks in its place.
    """
    for message in reversed(messages):
        if message.get("role") != "user" or not isinstance(message.get("content"), str):
            continue
        content = message["content"]
        matches = chunk_index.find(content)
        words = content[matches[-1].end :].strip() if matches else content.strip()
        if words:
            return str(words)
    return None


def find_ids(haystack: Sequence[int], needle: Sequence[int]) -> range | None:
    """Return the last occurrence of `needle` in `haystack` as a range of indices."""
    if not needle:
        return None
    for start in range(len(haystack) - len(needle), -1, -1):
        if list(haystack[start : start + len(needle)]) == list(needle):
            return range(start, start + len(needle))
    return None
