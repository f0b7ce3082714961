"""The prompt as the engine sees it: token ids segment by segment, some of which are chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

TextOrIds: TypeAlias = str | Sequence[int]

Message: TypeAlias = Mapping[str, Any]
"""A chat message, as chat templates take it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """An explicit prompt: `prefix`, the chunks in order, then `suffix` with the question.

    Each part is text or a list of token ids, and is tokenised alone, so the prompt's ids are the parts' ids joined.
    Between two chunks nothing is inserted; put separators into `glue`.

    Attributes:
        prefix: Everything before the first chunk; always computed exactly.
        chunks: The retrieved chunks, in prompt order. The cache of one that was never added (`engine.add_chunks`) is
            computed for this prompt alone and not stored.
        suffix: Everything after the last chunk; holds the question, unless `query` says otherwise.
        query: The question, where it is known apart from the suffix. Its tokens then ask in stage I if the suffix
            does not contain them, or if `ProphetKVConfig.query_scope` is `"question"`.
        glue: Put between two neighbouring chunks.
        leads: What stands directly before each chunk (a header with its source, say), one for each chunk; or nothing.
    """

    prefix: TextOrIds
    chunks: Sequence[TextOrIds]
    suffix: TextOrIds
    query: TextOrIds | None = None
    glue: TextOrIds = ""
    leads: Sequence[TextOrIds] = ()


AnyPrompt: TypeAlias = str | Sequence[Message] | Prompt
"""Text as it is, chat messages, or segments."""
