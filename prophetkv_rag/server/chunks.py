"""`/v1/chunks`: register and drop chunks, so that prompts of any application that hold them reuse their caches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prophetkv_rag.errors import ContextWindowError, InputError
from prophetkv_rag.server.conversations import ConversationService
from prophetkv_rag.server.errors import ApiError, shutting_down
from prophetkv_rag.server.schemas import DeleteChunks, PutChunks
from prophetkv_rag.server.work_queue import Ticket, WorkQueue

if TYPE_CHECKING:
    from prophetkv_rag.server.served import ServedEngine


_BEFORE = 16
"""Chunks before each one of a document that the engine is told of; it takes no more than its encoding says."""


@dataclass(frozen=True, slots=True)
class ChunkService:
    """Chunks over HTTP. A namespace is an owner of its own: it cannot drop what a local collection refers to."""

    engine: ServedEngine
    queue: WorkQueue
    conversations: ConversationService

    async def put(self, body: PutChunks) -> dict[str, Any]:
        """Compute and store what is missing; queued apart from chats, which go on between two batches.

        A client that goes away does not stop it, only a shutdown does; sent again, the chunks done by then are found.
        """

        def work(ticket: Ticket[list[str]]) -> Iterator[list[str]]:
            def stop_if_shut_down(done: int, total: int) -> None:
                if ticket.cancel.is_set():
                    raise shutting_down()

            behind = None
            if body.in_order:  # the engine takes as many of them as its encoding says
                behind = [body.chunks[max(0, number - _BEFORE) : number] for number in range(len(body.chunks))]
            try:
                yield self.engine.add_chunks(
                    body.chunks, owner=_owner(body.namespace), behind=behind, progress=stop_if_shut_down
                )
            except ContextWindowError as error:
                raise ApiError(str(error), param="chunks", code="context_length_exceeded") from error

        keys = await anext(self.queue.submit(work))
        return {
            "object": "list",
            "namespace": body.namespace,
            "data": [{"object": "chunk", "key": key} for key in keys],
        }

    async def delete(self, body: DeleteChunks) -> dict[str, Any]:
        """Drop the namespace's references; caches that nobody refers to any more are deleted.

        So is what is remembered of conversations from such chunks on, and with `all` of any that had this namespace.
        """
        return await asyncio.to_thread(self._delete, body)

    def _delete(self, body: DeleteChunks) -> dict[str, Any]:
        owner, store = _owner(body.namespace), self.engine.store
        if not (body.keys or body.chunks or body.all):
            msg = "say which chunks: keys, chunks (their texts), or all: true for the whole namespace"
            raise InputError(msg)
        held = set(store.references(owner))
        wanted = {*body.keys, *(self._key(text) for text in body.chunks)}
        dropped = sorted(held if body.all else held & wanted)
        deleted = self.engine.remove_chunks(dropped, owner=owner)
        if body.all:
            self.conversations.forget_namespace(body.namespace)
        return {"object": "list", "namespace": body.namespace, "dropped": dropped, "deleted": sorted(deleted)}

    def _key(self, text: str) -> str:
        return self.engine.key_of(text)

    async def stats(self, namespace: str | None) -> dict[str, Any]:
        """What the store holds, and how many chunks a namespace refers to."""
        return await asyncio.to_thread(self._stats, namespace)

    def _stats(self, namespace: str | None) -> dict[str, Any]:
        stats = self.engine.store.stats()
        found: dict[str, Any] = {
            "object": "chunks",
            "chunks": stats.chunks,
            "tokens": stats.tokens,
            "bytes": stats.nbytes,
            "hits": stats.hits,
            "misses": stats.misses,
            "corrupt": stats.corrupt,
        }
        if namespace is not None:
            found |= {"namespace": namespace, "namespace_chunks": len(self.engine.store.references(_owner(namespace)))}
        return found


def _owner(namespace: str) -> str:
    return f"http:{namespace}"
