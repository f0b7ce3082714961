"""An engine's conversations in a file, or as its bytes, so that they survive the process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from prophetkv_rag.conversations.file import RowShape, decode_rows, encode_rows
from prophetkv_rag.conversations.tier import ConversationTier
from prophetkv_rag.errors import BlobError, InputError, StoreError
from prophetkv_rag.model import ModelSupport
from prophetkv_rag.prompt import AnyPrompt, PromptLayout
from prophetkv_rag.store import CacheIdentity, ChunkStore, write_file

_NAME = "prophetkv conversations"
"""What an encrypted file is bound to: no blob is taken for one."""


class _Engine(Protocol):
    conversations: ConversationTier
    store: ChunkStore
    identity: CacheIdentity
    support: ModelSupport

    def read(self, prompt: AnyPrompt) -> PromptLayout: ...


class SavesConversations:
    """The half of an engine that writes conversations to files, or as bytes, and reads them back."""

    def save_conversation(self: _Engine, path: str | Path, prompt: AnyPrompt | None = None, *, tenant: str = "") -> int:
        """Write what is remembered of a tenant to one safetensors file, whole or not at all.

        The file is encrypted if the store is. Else whoever can read it can read the conversations: token ids are in it.
        It is made in RAM first, so that takes room for it once more (twice more where it is encrypted).

        Args:
            path: Of the file; what stood there is replaced.
            prompt: Text, messages or a `Prompt`: only the conversations that begin with it, or, where none does, the
                longest beginning of it that is remembered. `None` for all of the tenant's.
            tenant: As in `stream`; it is not written down.

        Returns:
            How many tokens were written.

        Raises:
            InputError: If there is nothing to write; what stood there is left alone.
            StoreError: If the file cannot be written, or the store is locked.
        """
        data, num_tokens = _dumped(self, prompt, tenant, "")
        if not num_tokens:
            what = "nothing" if prompt is None else "nothing that this prompt begins with"
            msg = f"{what} is remembered of tenant {tenant!r}, so {path} is not written; answer a prompt first"
            raise InputError(msg)
        try:
            write_file(Path(path), data)
        except OSError as error:
            msg = f"the conversation cannot be written to {path}: {error.strerror or error}"
            raise StoreError(msg) from error
        return num_tokens

    def load_conversation(self: _Engine, path: str | Path, *, tenant: str = "") -> int:
        """Remember what `save_conversation` wrote, beside what is remembered already.

        What stands behind chunks that are not known (any more) is left out, so add chunks first.

        Args:
            path: Of the file.
            tenant: Whose conversations they are from now on.

        Returns:
            How many tokens are remembered of the tenant now.

        Raises:
            InputError: If the file cannot be read, is damaged, is encrypted with another key or not at all, or was
                saved by an engine of another model, dtype, namespace, encoding or prompt template. Nothing of it is
                used then: the next prompt computes what it needs.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            msg = f"cannot read the conversation file {path}: {error.strerror or error}"
            raise InputError(msg) from error
        return _restored(self, data, tenant, "", f"the conversation file {path}")

    def dump_conversation(
        self: _Engine, prompt: AnyPrompt | None = None, *, tenant: str = "", bound_to: str = ""
    ) -> bytes:
        """Return what `save_conversation` writes, as bytes.

        Args:
            prompt: As in `save_conversation`.
            tenant: As in `save_conversation`.
            bound_to: Where the store encrypts, only `restore_conversation` with the same words takes the bytes: so
                whoever comes by them cannot go on with somebody else's conversation.

        Raises:
            InputError: If there is nothing to write.
            StoreError: If the store is locked.
        """
        data, num_tokens = _dumped(self, prompt, tenant, bound_to)
        if not num_tokens:
            msg = "nothing is remembered, so there is nothing to save; answer a prompt first"
            raise InputError(msg)
        return data

    def restore_conversation(self: _Engine, data: bytes, *, tenant: str = "", bound_to: str = "") -> int:
        """Remember what `dump_conversation` gave, as `load_conversation` does.

        Args:
            data: Its bytes.
            tenant: Whose conversations they are from now on.
            bound_to: As in `dump_conversation`.

        Returns:
            How many tokens are remembered of the tenant now.

        Raises:
            InputError: As `load_conversation`.
        """
        return _restored(self, data, tenant, bound_to, "the conversation")


def _dumped(engine: _Engine, prompt: AnyPrompt | None, tenant: str, bound_to: str) -> tuple[bytes, int]:
    """Return the bytes of what is remembered, and of how many tokens; none at all of none."""
    token_ids = None if prompt is None else engine.read(prompt).input_ids
    saved = engine.conversations.copy_of(tenant, token_ids)
    if not saved.num_tokens:
        return b"", 0
    return engine.store.seal(_NAME + bound_to, encode_rows(saved, _told(engine.identity))), saved.num_tokens


def _restored(engine: _Engine, data: bytes, tenant: str, bound_to: str, what: str) -> int:
    layers = engine.support.layers
    shapes = [RowShape(layer.num_key_value_heads, layer.head_dim, layer.value_head_dim) for layer in layers]
    try:
        plain = engine.store.unseal(_NAME + bound_to, data)
    except BlobError as error:
        whose = ", or it was saved for somebody else, who alone can load it where the store is encrypted"
        msg = f"{what} is not loaded: {error}{whose if bound_to else ''}"
        raise InputError(msg) from error
    try:
        saved = decode_rows(plain, _told(engine.identity), shapes, getattr(torch, engine.support.dtype))
    except BlobError as error:
        msg = f"{what} is not loaded: {error}"
        raise InputError(msg) from error
    del data, plain
    engine.conversations.add(saved, tenant)
    return engine.conversations.stats(tenant).tokens


def _told(identity: CacheIdentity) -> Mapping[str, str]:
    """Return what must be the same, by the names that a message has for it, the plainest first."""
    return {
        "dtype": identity.dtype,
        "model": identity.model,
        "tokenizer": identity.tokenizer,
        "namespace, encoding or prompt template": identity.fingerprint,
    }
