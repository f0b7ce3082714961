"""The user's key for chunk caches at rest: where it comes from, and how a blob names it without telling it."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from pathlib import Path
from typing import NoReturn, TypeAlias

from prophetkv_rag.errors import InputError
from prophetkv_rag.extras import needs

KEY_BYTES = 32
KEY_VARIABLE = "PROPHETKV_CACHE_KEY"
"""Environment variable with the key as 64 hex digits, looked at where no key is given."""

KeySource: TypeAlias = "bytes | str | Path | EncryptionKey | None"
_HOW = f"a key is {KEY_BYTES} bytes, or {2 * KEY_BYTES} hex digits; make one with: prophetkv-rag cache new-key FILE"


class EncryptionKey:
    """A 256-bit key. It shows itself by its id alone, and cannot be pickled.

    Args:
        secret: 32 random bytes.

    Attributes:
        id: 32 hex digits derived from the key, which do not tell it: what blobs and messages name it by.

    Raises:
        InputError: If it has another length, or the package `cryptography` is missing.
    """

    __slots__ = ("_secret", "id")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            msg = f"the encryption key has {len(secret)} bytes; {_HOW}"
            raise InputError(msg)
        self._secret = bytes(secret)
        self.id = self.derive(b"", b"prophetkv-rag key id", 16).hex()

    def derive(self, salt: bytes, purpose: bytes, length: int = KEY_BYTES) -> bytes:
        """Return a key for one purpose and salt, from which neither this key nor another derived one can be found."""
        with needs("encryption", "cryptography.hazmat.primitives.hashes", what="encrypting chunk caches"):
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        return HKDF(SHA256(), length, salt or None, purpose).derive(self._secret)

    def __repr__(self) -> str:
        return f"EncryptionKey(id={self.id!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncryptionKey) and secrets.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> NoReturn:
        msg = "an encryption key is not pickled"
        raise TypeError(msg)


def load_key(source: KeySource = None) -> EncryptionKey | None:
    """Return the key from wherever it is.

    Args:
        source: The 32 bytes themselves, or the path of a file that holds them (or 64 hex digits) and that only its
            owner may read. `None` for the environment variable `PROPHETKV_CACHE_KEY`, and no key where that is not set.

    Raises:
        InputError: If it is no key, or a file that others may read; the message never has any of its content.
    """
    if source is None:
        text = os.environ.get(KEY_VARIABLE, "")
        return _parse(text.encode(), f"the environment variable {KEY_VARIABLE}") if text else None
    if isinstance(source, EncryptionKey):
        return source
    if isinstance(source, bytes | bytearray):
        return EncryptionKey(bytes(source))
    path = Path(source)
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(4096)
    except OSError as error:
        msg = f"cannot read the key file {path}: {error.strerror or error}"
        raise InputError(msg) from error
    if sys.platform != "win32" and stat.S_IMODE(status.st_mode) & 0o077:
        msg = (
            f"the key file {path} may be read or written by others (mode {stat.S_IMODE(status.st_mode):04o}); make it "
            f"private first: chmod 600 {path}"
        )
        raise InputError(msg)
    return _parse(data, f"the key file {path}")


def write_new_key(path: str | Path) -> EncryptionKey:
    """Make a random key and write it to a new file that only its owner may read, as hex digits.

    Raises:
        InputError: If the file is there already, or cannot be written.
    """
    secret = secrets.token_bytes(KEY_BYTES)
    key = EncryptionKey(secret)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret.hex().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        msg = f"cannot write a new key to {path}: {error.strerror or error}; a key that is there is not written over"
        raise InputError(msg) from error
    return key


def _parse(data: bytes, name: str) -> EncryptionKey:
    if len(data) == KEY_BYTES:
        return EncryptionKey(data)
    try:
        secret = bytes.fromhex(data.decode("ascii").strip())
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        msg = f"{name} holds no key ({len(data)} bytes); {_HOW}"
        raise InputError(msg) from None
    return EncryptionKey(secret)
