"""An encrypted blob is Tink's: Tink reads what we write, we read what Tink writes, and neither reads a changed one."""

from __future__ import annotations

import random
from io import BytesIO
from typing import Any

import pytest

from prophetkv_rag.errors import BlobError
from prophetkv_rag.store.encryption import EncryptionKey, seal, sealing, unseal
from prophetkv_rag.store.encryption.sealing import CLEAR_BYTES

tink = pytest.importorskip("tink")  # there are no wheels of it for every platform, and only this file needs it

SECRET = bytes(range(32))
MINE = EncryptionKey(SECRET)
KEY = "ab" * 32


class Kept(BytesIO):
    """What is left open when Tink closes it."""

    def close(self) -> None:
        pass


def streaming_aead(segment_bytes: int) -> Any:
    """Tink's primitive for a keyset that holds the user's key as it is."""
    from tink import proto_keyset_format, secret_key_access, streaming_aead
    from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

    streaming_aead.register()
    params = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingParams(
        ciphertext_segment_size=segment_bytes, derived_key_size=32, hkdf_hash_type=common_pb2.SHA256
    )
    key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(key_value=SECRET, params=params)
    data = tink_pb2.KeyData(
        type_url=streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB.type_url,
        value=key.SerializeToString(),
        key_material_type=tink_pb2.KeyData.SYMMETRIC,
    )
    keyset = tink_pb2.Keyset(primary_key_id=1)
    keyset.key.add(key_data=data, status=tink_pb2.ENABLED, key_id=1, output_prefix_type=tink_pb2.RAW)
    handle = proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN)
    return handle.primitive(streaming_aead.StreamingAead)


def associated(sealed: bytes) -> bytes:
    return sealed[:CLEAR_BYTES] + KEY.encode()


def tink_seals(data: bytes, clear: bytes, segment_bytes: int) -> bytes:
    written = Kept()
    with streaming_aead(segment_bytes).new_encrypting_stream(written, clear + KEY.encode()) as stream:
        stream.write(data)
    return clear + written.getvalue()


def tink_unseals(sealed: bytes, segment_bytes: int) -> bytes:
    source = BytesIO(sealed[CLEAR_BYTES:])
    found: bytes = streaming_aead(segment_bytes).new_decrypting_stream(source, associated(sealed)).read()
    return found


@pytest.mark.parametrize("segment_bytes", [80, 100, 1 << 20])
def test_tink_reads_ours_and_we_read_tinks(monkeypatch: pytest.MonkeyPatch, segment_bytes: int) -> None:
    """With plain blobs that end before, at and after a segment's end."""
    monkeypatch.setattr(sealing, "SEGMENT_BYTES", segment_bytes)
    first, others = segment_bytes - 56, segment_bytes - 16
    ends = [first, first + others, first + 4 * others]
    for nbytes in [0, 1, *(end + off for end in ends for off in (-1, 0, 1))]:
        plain = random.Random(nbytes).randbytes(nbytes)
        sealed = seal(plain, MINE, key=KEY)
        assert tink_unseals(sealed, segment_bytes) == plain
        theirs = tink_seals(plain, sealed[:CLEAR_BYTES], segment_bytes)
        assert len(theirs) == len(sealed)
        assert unseal(theirs, MINE, key=KEY) == plain


def test_neither_reads_what_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SEGMENT_BYTES", 100)
    plain, generator = random.Random(1).randbytes(1000), random.Random(2)
    sealed = seal(plain, MINE, key=KEY)
    for _ in range(300):
        data = bytearray(sealed)
        place = generator.randrange(CLEAR_BYTES, len(data))
        kind = generator.randrange(3)
        if kind == 0:
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del data[place:]
        else:
            data[place:place] = generator.randbytes(generator.choice([1, 16, 100]))
        if bytes(data) == sealed:
            continue
        with pytest.raises(tink.TinkError):
            tink_unseals(bytes(data), 100)
        with pytest.raises(BlobError):
            unseal(bytes(data), MINE, key=KEY)
