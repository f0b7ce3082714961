"""A blob encrypted: AES-256-GCM in segments, each with a tag of its own, so that it can be read and checked in steps.

    magic, key id, salt, sizes      in clear, and authenticated with every segment, as is the chunk's key
    segment 0                       length and header of the safetensors file within
    segment 1, 2, ...               its tensors, a mebibyte each; the last is shorter

Every blob has an encryption key of its own, derived from the user's and 32 random bytes; within a blob the nonce is the
segment's number. So no nonce is used twice with a key however many blobs are written, and a segment fits nowhere else.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store.encryption.user_key import EncryptionKey

MAGIC = b"PKVSEAL1"
"""First bytes of an encrypted blob. A plain one begins with its header's length, which is never that large."""
SEGMENT_BYTES = 1 << 20
TAG_BYTES = 16
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 1 << 24
_CLEAR = struct.Struct("<8s16s32sQQ")
CLEAR_BYTES = _CLEAR.size
_PURPOSE = b"prophetkv-rag blob"
SLACK_BYTES = 15
"""Room that the decryptor asks for behind what it writes."""


class LockedBlobError(BlobError):
    """An encrypted blob where there is no key: nobody can tell whether it is good, so it is left where it is."""


@dataclass(frozen=True, slots=True)
class SealedSizes:
    """What the clear part of an encrypted blob says.

    Attributes:
        head: Bytes of the length and header within.
        body: Bytes of the tensors within.
    """

    clear: bytes
    salt: bytes
    head: int
    body: int

    @property
    def total(self) -> int:
        """Size of the whole encrypted blob."""
        segments = -(-self.body // SEGMENT_BYTES)
        return CLEAR_BYTES + self.head + self.body + (1 + segments) * TAG_BYTES


def is_sealed(start: bytes | memoryview) -> bool:
    """Whether a blob that begins with these bytes (8 of them, at least) is encrypted."""
    return bytes(start[: len(MAGIC)]) == MAGIC


def seal(data: bytes, encryption_key: EncryptionKey, *, key: str) -> bytes:
    """Encrypt a whole plain blob.

    Args:
        data: What `encode_blob` made.
        encryption_key: The user's.
        key: The chunk's; the blob can be read under no other.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt = secrets.token_bytes(32)
    view = memoryview(data)
    head = LENGTH_BYTES + int.from_bytes(view[:LENGTH_BYTES], "little")
    clear = _CLEAR.pack(MAGIC, bytes.fromhex(encryption_key.id), salt, head, len(view) - head)
    cipher = AESGCM(encryption_key.derive(salt, _PURPOSE))
    parts = [clear, cipher.encrypt(_nonce(0), view[:head], clear + key.encode())]
    for number, start in enumerate(range(head, len(view), SEGMENT_BYTES), 1):
        parts.append(cipher.encrypt(_nonce(number), view[start : start + SEGMENT_BYTES], clear + key.encode()))
    return b"".join(parts)


def unseal(data: bytes, encryption_key: EncryptionKey, *, key: str) -> bytes:
    """Return the plain blob within an encrypted one.

    Raises:
        BlobError: If it was changed, is another chunk's, or was made with another key.
    """
    sizes, encryption_key = parse_clear(data[:CLEAR_BYTES], encryption_key, len(data))
    file = BytesIO(data)
    file.seek(CLEAR_BYTES)
    opener = Opener(sizes, encryption_key, key, file.readinto)
    head, body = opener.head(), bytearray(sizes.body + SLACK_BYTES)
    for _ in opener.body_into(memoryview(body)):
        pass
    return head + body[: sizes.body]


def parse_clear(
    clear: bytes, encryption_key: EncryptionKey | None, total_bytes: int
) -> tuple[SealedSizes, EncryptionKey]:
    """Check the clear part of an encrypted blob before memory is taken for the rest.

    Raises:
        LockedBlobError: If there is no key.
        BlobError: If it was made with another key, or its sizes are not those of the file.
    """
    if encryption_key is None:
        msg = "it is encrypted, and no key was given"
        raise LockedBlobError(msg)
    if len(clear) != CLEAR_BYTES or not is_sealed(clear):
        msg = f"it is truncated, or not encrypted: {total_bytes} bytes"
        raise BlobError(msg)
    _, key_id, salt, head, body = _CLEAR.unpack(clear)
    if key_id.hex() != encryption_key.id:
        msg = f"it is encrypted with another key: its id is {key_id.hex()}, this one's is {encryption_key.id}"
        raise BlobError(msg)
    sizes = SealedSizes(clear, salt, head, body)
    if not LENGTH_BYTES <= head <= LENGTH_BYTES + MAX_HEADER_BYTES or sizes.total != total_bytes:
        msg = f"it is truncated, or its sizes are wrong: {total_bytes} bytes instead of {sizes.total}"
        raise BlobError(msg)
    return sizes, encryption_key


class Opener:
    """Decrypts the segments of one blob, in order.

    Args:
        sizes: Its checked clear part.
        encryption_key: The key that it was made with.
        key: The chunk's.
        read_into: Fills a buffer with what comes next in the blob; returns how many bytes there were.
    """

    def __init__(
        self, sizes: SealedSizes, encryption_key: EncryptionKey, key: str, read_into: Callable[[memoryview], int]
    ) -> None:
        self._sizes = sizes
        self._secret = encryption_key.derive(sizes.salt, _PURPOSE)
        self._associated = sizes.clear + key.encode()
        self._read_into = read_into
        self._scratch = memoryview(bytearray(max(sizes.head, min(sizes.body, SEGMENT_BYTES)) + TAG_BYTES))

    def head(self) -> bytes:
        """Return length and header of the blob within."""
        out = memoryview(bytearray(self._sizes.head + SLACK_BYTES))
        self._open(0, out, self._sizes.head)
        return bytes(out[: self._sizes.head])

    def body_into(self, out: memoryview) -> Iterator[int]:
        """Fill `out`, of `body` bytes and 15 more, a segment at a time; yields how far it is filled and proven."""
        for number, start in enumerate(range(0, self._sizes.body, SEGMENT_BYTES), 1):
            size = min(SEGMENT_BYTES, self._sizes.body - start)
            self._open(number, out[start : start + size + SLACK_BYTES], size)
            yield start + size

    def _open(self, number: int, out: memoryview, size: int) -> None:
        """Decrypt into `out`; what is written there is worth nothing if this raises."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        sealed = self._scratch[: size + TAG_BYTES]
        if self._read_into(sealed) != len(sealed):
            msg = "it became shorter while it was read"
            raise BlobError(msg)
        cipher: Any = Cipher(algorithms.AES(self._secret), modes.GCM(_nonce(number), bytes(sealed[size:])))
        decryptor = cipher.decryptor()
        decryptor.authenticate_additional_data(self._associated)
        try:
            decryptor.update_into(sealed[:size], out)
            decryptor.finalize()
        except InvalidTag:
            msg = f"its segment {number} was changed, or belongs to another chunk or blob"
            raise BlobError(msg) from None


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")
