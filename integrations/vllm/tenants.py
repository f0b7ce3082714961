"""Which prompts vLLM's prefix cache gives to whom: a salt for every tenant, until it is forgotten."""

from __future__ import annotations

import hashlib
import secrets
import threading

_MOST = 4096
"""Tenants and namespaces that were forgotten and are told apart; with one more, everybody is forgotten."""


class TenantSalts:
    """vLLM's `cache_salt` for each tenant. Any thread may call.

    Nobody else comes to a salt: it is made of random bytes of this process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._secret = secrets.token_hex()
        self._renewed: dict[str, str] = {}

    def salt(self, tenant: str) -> str:
        """Return a tenant's; the same until `forget`."""
        with self._lock:
            parts = (tenant, *(self._renewed.get(name, "") for name in (tenant, _namespace_of(tenant))))
            return hashlib.sha256("|".join((self._secret, *parts)).encode("utf-8", "surrogateescape")).hexdigest()

    @staticmethod
    def once() -> str:
        """Return a salt for a prompt that is to be kept for nobody."""
        return secrets.token_hex()

    def forget(self, tenant: str) -> None:
        """Have what was computed for a tenant found no more."""
        self._renew(tenant)

    def forget_namespace(self, namespace: str) -> None:
        """Have what was computed for the tenants `namespace/...` found no more."""
        self._renew(_namespace_of(namespace))

    def _renew(self, name: str) -> None:
        with self._lock:
            if len(self._renewed) >= _MOST and name not in self._renewed:
                self._secret = secrets.token_hex()
                self._renewed.clear()
            self._renewed[name] = secrets.token_hex()


def _namespace_of(tenant: str) -> str:
    return f"{tenant.partition('/')[0]}/*"
