"""`/v1/conversations`: whose conversations go on from each other over HTTP; saving, loading and forgetting them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request

from prophetkv_rag.errors import InputError
from prophetkv_rag.server.errors import ApiError
from prophetkv_rag.server.work_queue import Ticket, WorkQueue

if TYPE_CHECKING:
    from prophetkv_rag.conversations import ConversationTier
    from prophetkv_rag.server.schemas import ReuseOptions
    from prophetkv_rag.server.served import ServedEngine, TenantSalts

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class ConversationService:
    """What is remembered of chats, apart for every API key, and within one for every namespace.

    Attributes:
        engine: Remembers them.
        queue: Where conversations are saved and loaded, one after the other.
        has_keys: Whether requests have API keys.
        max_bytes: Longest conversation that is saved.
    """

    engine: ServedEngine
    queue: WorkQueue
    has_keys: bool
    max_bytes: int

    @property
    def tier(self) -> ConversationTier | None:
        """The engine's; `None` of one that remembers in a way of its own (vLLM)."""
        return getattr(self.engine, "conversations", None)

    @property
    def salts(self) -> TenantSalts | None:
        """Of such an engine."""
        return getattr(self.engine, "tenant_salts", None)

    def options(self, request: Request, ours: ReuseOptions) -> dict[str, Any]:
        """Return what the engine is told of whose conversation a request goes on with."""
        return {"remember": ours.remember, "tenant": self._tenant(request, ours.namespace or DEFAULT)}

    def forget(self, request: Request, namespace: str) -> dict[str, Any]:
        """Forget the conversations of a namespace, as far as they are this API key's.

        How many tokens that were is not known of an engine that remembers in a way of its own.
        """
        tenant = self._tenant(request, namespace)
        tokens = None
        if self.tier is not None:
            tokens = self.tier.stats(tenant).tokens
            self.tier.forget(tenant)
        elif self.salts is not None:
            self.salts.forget(tenant)
        return {"object": "conversations", "namespace": namespace, "forgotten_tokens": tokens}

    async def dump(self, request: Request, namespace: str) -> bytes:
        """Return what is remembered of a namespace of this API key, as `restore` takes it.

        Raises:
            ApiError: If that is nothing (404), or longer than is given out (413).
        """
        engine, tenant = self._saving_engine(), self._tenant(request, namespace)

        def work(ticket: Ticket[bytes]) -> Iterator[bytes]:
            stats = engine.conversations.stats(tenant)
            if not stats.tokens:
                message = f"nothing is remembered in the namespace {namespace!r}; answer a prompt first"
                raise ApiError(message, status=404, code="not_found", param="namespace")
            if stats.nbytes > self.max_bytes:
                message = (
                    f"what is remembered in the namespace {namespace!r} takes {stats.nbytes} bytes, and this server "
                    f"gives out {self.max_bytes} at most; put conversations into namespaces of their own"
                )
                raise ApiError(message, status=413, code="conversation_too_large", param="namespace")
            yield engine.dump_conversation(tenant=tenant, bound_to=tenant)

        return await anext(self.queue.submit(work))

    async def restore(self, request: Request, namespace: str, data: bytes) -> dict[str, Any]:
        """Remember what `dump` gave, in a namespace of this API key.

        Raises:
            InputError: If it is damaged, another model's, or, where the store is encrypted, was given to another key
                or namespace; nothing of it is used.
        """
        engine, tenant = self._saving_engine(), self._tenant(request, namespace)

        def work(ticket: Ticket[int]) -> Iterator[int]:
            yield engine.restore_conversation(data, tenant=tenant, bound_to=tenant)

        tokens = await anext(self.queue.submit(work))
        return {"object": "conversations", "namespace": namespace, "remembered_tokens": tokens}

    def _saving_engine(self) -> Any:  # a ProphetKVEngine; vLLM's has no such methods
        if self.tier is None:
            msg = "conversations are not saved and loaded with vLLM, which keeps prompts by itself"
            raise InputError(msg)
        return self.engine

    def forget_namespace(self, namespace: str) -> None:
        """Forget the conversations of a namespace, whoever's they are."""
        tier = self.tier
        for tenant in tier.tenants() if tier is not None else ():
            if tier is not None and tenant.partition("/")[0] == namespace:
                tier.forget(tenant)
        if self.salts is not None:
            self.salts.forget_namespace(namespace)

    def _tenant(self, request: Request, namespace: str) -> str:
        given = request.headers.get("authorization", "") if self.has_keys else ""
        key = given.partition(" ")[2].strip()
        return f"{namespace}/{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest() if key else ''}"
