"""What the server needs of whatever answers: our engine on transformers, or vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prophetkv_rag.generation import StreamChunk
    from prophetkv_rag.prompt import AnyPrompt, ChunkIndex, Tokens
    from prophetkv_rag.store import ChunkStore


class TenantSalts(Protocol):
    """How an engine without a `conversations` of ours keeps tenants apart; it remembers in a way of its own."""

    def forget(self, tenant: str) -> None:
        """Have what was computed for a tenant found no more."""

    def forget_namespace(self, namespace: str) -> None:
        """Have what was computed for the tenants of a namespace found no more."""


class ServedEngine(Protocol):
    """See `ProphetKVEngine`, whose contract these methods have. Any thread may call."""

    store: ChunkStore

    @property
    def max_concurrent(self) -> int:
        """Answers that it can work on at a time."""

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be chat messages."""

    @property
    def tokens(self) -> Tokens:
        """Renders chats that show tools."""

    @property
    def chunk_index(self) -> ChunkIndex:
        """Finds the texts of stored chunks in prompts."""

    def key_of(self, text: str) -> str:
        """Return the key of the chunk with this text, whether or not it is known."""

    def add_chunks(
        self,
        texts: Sequence[str],
        *,
        owner: str,
        behind: Sequence[Sequence[str]] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Compute and store the caches of chunks."""

    def remove_chunks(self, keys: Iterable[str], *, owner: str) -> list[str]:
        """Drop references."""

    def stream(self, prompt: AnyPrompt, **settings: Any) -> Iterator[StreamChunk]:
        """Answer a prompt piece by piece."""
