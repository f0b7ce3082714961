"""A blob encrypted as Tink's streaming AEAD does it, so that it can be read and checked in steps.

    magic, key id                   in clear; bound to every segment, as is the chunk's key
    length, salt, nonce prefix      Tink's header: AES-256-GCM-HKDF, of the user's key, the above being associated data
    segment 0, 1, 2, ...            the plain blob; the header and segment 0 together, and all others, fill a mebibyte

The format is Tink's to the byte, and the tests have Tink read and write it. Its binding for Python is not used here: it
copies all data several times over, by which loading an encrypted cache takes twice the processor time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from io import BytesIO

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store.encryption.user_key import EncryptionKey

MAGIC = b"PKVSEAL1"
"""First bytes of an encrypted blob. A plain one begins with its header's length, which is never that large."""
SEGMENT_BYTES = 1 << 20
CLEAR_BYTES = len(MAGIC) + 16
_SALT_BYTES = 32
_PREFIX_BYTES = 7  # of a nonce; the segment's number and whether it is the last follow
HEADER_BYTES = 1 + _SALT_BYTES + _PREFIX_BYTES
TAG_BYTES = 16


class LockedBlobError(BlobError):
    """An encrypted blob where there is no key: nobody can tell whether it is good, so it is left where it is."""


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

    clear = MAGIC + bytes.fromhex(encryption_key.id)
    salt, prefix = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_PREFIX_BYTES)
    cipher = AESGCM(encryption_key.derive(salt, clear + key.encode()))
    parts, view = [clear, bytes([HEADER_BYTES]), salt, prefix], memoryview(data)
    for number, size, is_last in _segments(len(data)):
        parts.append(cipher.encrypt(_nonce(prefix, number, is_last), view[:size], None))
        view = view[size:]
    return b"".join(parts)


def unseal(data: bytes, encryption_key: EncryptionKey, *, key: str) -> bytes:
    """Return the plain blob within an encrypted one.

    Raises:
        BlobError: If it was changed, is another chunk's, or was made with another key.
    """
    unsealed = Unsealed(BytesIO(data).readinto, len(data), encryption_key, key=key)
    plain, done = bytearray(unsealed.nbytes), 0
    while count := unsealed.readinto(memoryview(plain)[done:]):
        done += count
    return bytes(plain)


class Unsealed:
    """The plain blob within an encrypted one, read from its beginning on; whatever it gives has been proven.

    Args:
        read_into: Fills a buffer with what comes next in the encrypted blob; returns how many bytes there were.
        file_bytes: Size of the encrypted blob.
        encryption_key: The user's.
        key: The chunk's.

    Attributes:
        nbytes: Size of the plain blob, if the encrypted one is what it should be.
        segment_bytes: How many bytes are best asked for at once: a segment is decrypted to where it is wanted.

    Raises:
        LockedBlobError: If there is no key.
        BlobError: If it was made with another key, or is no encrypted blob.
    """

    def __init__(
        self,
        read_into: Callable[[memoryview], int],
        file_bytes: int,
        encryption_key: EncryptionKey | None,
        *,
        key: str,
    ) -> None:
        if encryption_key is None:  # also where the package is not installed
            msg = "it is encrypted, and no key was given"
            raise LockedBlobError(msg)
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        start = memoryview(bytearray(CLEAR_BYTES + HEADER_BYTES))
        count = read_into(start)
        clear, header = bytes(start[:CLEAR_BYTES]), bytes(start[CLEAR_BYTES:])
        stream_bytes = file_bytes - CLEAR_BYTES
        self.nbytes = stream_bytes - HEADER_BYTES - TAG_BYTES * max(1, -(-stream_bytes // SEGMENT_BYTES))
        if count != len(start) or not is_sealed(clear) or self.nbytes < 0:
            msg = f"it is truncated, or not encrypted: {file_bytes} bytes"
            raise BlobError(msg)
        key_id = clear[len(MAGIC) :].hex()
        if key_id != encryption_key.id:
            msg = f"it is encrypted with another key: its id is {key_id}, this one's is {encryption_key.id}"
            raise BlobError(msg)
        if header[0] != HEADER_BYTES:
            msg = f"it is encrypted in a way that is not known: a header of {header[0]} bytes"
            raise BlobError(msg)
        salt, self._prefix = header[1 : 1 + _SALT_BYTES], header[1 + _SALT_BYTES :]
        self._cipher = AESGCM(encryption_key.derive(salt, clear + key.encode()))
        self.segment_bytes = SEGMENT_BYTES
        self._read_into = read_into
        self._scratch = memoryview(bytearray(min(self.nbytes + TAG_BYTES, SEGMENT_BYTES)))
        self._segments = _segments(self.nbytes)
        self._plain = memoryview(b"")

    def readinto(self, view: memoryview, /) -> int:
        """Fill `view` with what comes next, of one segment at most; returns how many bytes, 0 at the end.

        Raises:
            BlobError: If that is not what was written for this chunk; what `view` holds then is worth nothing.
        """
        from cryptography.exceptions import InvalidTag

        if not self._plain:
            segment = next(self._segments, None)
            if segment is None:
                return 0
            number, size, is_last = segment
            sealed, nonce = self._scratch[: size + TAG_BYTES], _nonce(self._prefix, number, is_last)
            if self._read_into(sealed) != len(sealed):
                msg = "it became shorter while it was read"
                raise BlobError(msg)
            try:
                if len(view) >= size and hasattr(self._cipher, "decrypt_into"):  # cryptography 47
                    return self._cipher.decrypt_into(nonce, sealed, None, view[:size])
                self._plain = memoryview(self._cipher.decrypt(nonce, sealed, None))
            except InvalidTag:
                msg = f"its segment {number} was changed, or belongs to another chunk or blob"
                raise BlobError(msg) from None
        count = min(len(view), len(self._plain))
        view[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count


def _segments(nbytes: int) -> Iterator[tuple[int, int, bool]]:
    """Number and size of each segment of a plain blob, and whether it is the last."""
    number, size = 0, SEGMENT_BYTES - HEADER_BYTES - TAG_BYTES
    while nbytes > size:
        yield number, size, False
        number, nbytes, size = number + 1, nbytes - size, SEGMENT_BYTES - TAG_BYTES
    yield number, nbytes, True


def _nonce(prefix: bytes, number: int, is_last: bool) -> bytes:
    """Return a segment's nonce; that it says which is the last is what tells a cut blob from a whole one."""
    return prefix + number.to_bytes(4, "big") + bytes([is_last])
