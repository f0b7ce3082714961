"""`/v1/conversations`: whose conversations go on from each other over HTTP, and forgetting them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request

if TYPE_CHECKING:
    from prophetkv_rag.conversations import ConversationTier
    from prophetkv_rag.server.schemas import ReuseOptions
    from prophetkv_rag.server.served import ServedEngine, TenantSalts

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class ConversationService:
    """What is remembered of chats, apart for every API key, and within one for every namespace."""

    engine: ServedEngine
    has_keys: bool

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
