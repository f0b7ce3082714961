"""An engine's conversations in a file, so that they survive the process."""

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
    """The half of an engine that writes conversations to files and reads them back."""

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
        token_ids = None if prompt is None else self.read(prompt).input_ids
        saved = self.conversations.copy_of(tenant, token_ids)
        if not saved.num_tokens:
            what = "nothing" if prompt is None else "nothing that this prompt begins with"
            msg = f"{what} is remembered of tenant {tenant!r}, so {path} is not written; answer a prompt first"
            raise InputError(msg)
        data = encode_rows(saved, _told(self.identity))
        try:
            write_file(Path(path), self.store.seal(_NAME, data))
        except OSError as error:
            msg = f"the conversation cannot be written to {path}: {error.strerror or error}"
            raise StoreError(msg) from error
        return saved.num_tokens

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
        layers = self.support.layers
        shapes = [RowShape(layer.num_key_value_heads, layer.head_dim, layer.value_head_dim) for layer in layers]
        try:
            plain = self.store.unseal(_NAME, data)
            saved = decode_rows(plain, _told(self.identity), shapes, getattr(torch, self.support.dtype))
        except BlobError as error:
            msg = f"the conversation file {path} is not loaded: {error}"
            raise InputError(msg) from error
        del data, plain
        self.conversations.add(saved, tenant)
        return self.conversations.stats(tenant).tokens


def _told(identity: CacheIdentity) -> Mapping[str, str]:
    """Return what must be the same, by the names that a message has for it, the plainest first."""
    return {
        "dtype": identity.dtype,
        "model": identity.model,
        "tokenizer": identity.tokenizer,
        "namespace, encoding or prompt template": identity.fingerprint,
    }
