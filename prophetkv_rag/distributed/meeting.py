"""Whether the caller and every worker write to one place, with one key: a small file that one leaves and others read.

A `file://` path that is not mounted everywhere, credentials that one machine lacks, another encryption key: each would
be found when hours of work cannot be.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prophetkv_rag.errors import BlobError, InputError
from prophetkv_rag.store import ChunkStore
from prophetkv_rag.store.remote import RemoteFiles

_SAID = b"prophetkv-rag: all workers write here"


@contextmanager
def left_for_workers(files: RemoteFiles | None, store: ChunkStore, fingerprint: str) -> Iterator[str]:
    """Leave the file while the block runs; yields its name, "" where there is no remote tier.

    Raises:
        InputError: If the remote tier cannot be written to.
    """
    if files is None:
        yield ""
        return
    name = secrets.token_hex(32)
    try:
        files.write(fingerprint, name, store.seal(name, _SAID))
    except Exception as error:  # whatever a file system raises
        msg = f"the remote tier {files.name} cannot be written to: {_said(error)}"
        raise InputError(msg) from error
    try:
        yield name
    finally:
        with suppress(Exception):  # a few bytes are left over
            files.remove(fingerprint, name)


def must_be_here(files: RemoteFiles, store: ChunkStore, fingerprint: str, name: str) -> None:
    """Find what the caller has left, and write beside it.

    Raises:
        InputError: If it is not there or cannot be read with this store's key, or nothing can be written.
    """
    try:
        data = files.read(fingerprint, name)
    except FileNotFoundError as error:
        msg = (
            f"{files.name} is another place here than where the caller is: what that wrote is not there. Give a remote "
            "tier that all machines reach under one URL"
        )
        raise InputError(msg) from error
    except Exception as error:
        msg = f"the remote tier {files.name} cannot be read: {_said(error)}"
        raise InputError(msg) from error
    try:
        is_ours = store.unseal(name, data) == _SAID
    except BlobError as error:
        msg = (
            f"caches are encrypted here with another key than where the caller is, or not at all ({error}): the key "
            "file must be the same, at the same path, on every machine"
        )
        raise InputError(msg) from error
    own = secrets.token_hex(32)
    try:
        files.write(fingerprint, own, data)
        files.remove(fingerprint, own)
    except Exception as error:
        msg = f"the remote tier {files.name} cannot be written to: {_said(error)}"
        raise InputError(msg) from error
    if not is_ours:
        msg = f"the remote tier {files.name} does not give back what was written"
        raise InputError(msg)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
