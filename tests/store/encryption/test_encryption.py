"""Caches at rest under a user's key: what is on disk tells nothing, and nothing else than what was written is read."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import pickle
import random
import struct
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import pytest
from cryptography.hazmat.primitives.ciphers import aead

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.errors import BlobError, InputError, StoreError
from prophetkv_rag.store.blobs import file as blob_file
from prophetkv_rag.store.blobs.blob import encode_blob
from prophetkv_rag.store.blobs.file import decode_file
from prophetkv_rag.store.blobs.formats import BlobFormat
from prophetkv_rag.store.disk.rekeying import RekeyReport, rekey
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.transfer import export_caches, import_caches
from prophetkv_rag.store.disk.upkeep import clear
from prophetkv_rag.store.encryption import sealing
from prophetkv_rag.store.encryption.sealing import CLEAR_BYTES, HEADER_BYTES, LockedBlobError, seal
from prophetkv_rag.store.encryption.user_key import KEY_VARIABLE, EncryptionKey, load_key, write_new_key
from tests.store.caches import FINGERPRINT, assert_same, ids_of, key_of, make_cache
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

SECRET, OTHER_SECRET = bytes(range(32)), bytes(range(1, 33))
MINE, OTHER = EncryptionKey(SECRET), EncryptionKey(OTHER_SECRET)
PLAIN = encode_blob(make_cache(1), key=key_of(1), fingerprint=FINGERPRINT)
TINKS = bytes.fromhex(
    "504b565345414c3101fa4f169357907108712bf95da17adc289dba695b623a04c62e21f3eefcb63e679a9fd4baa9622ad1e97780"
    "0ff7b48574683ab6550964a706dc6a4d4cfb1fc7f46ff264c0019b6dc6b519e0f2a7361cddee751683cbd3557dfaa18c6081fab4"
    "fa59aef16980b0d15fed00496603a02eea29a3799869e26d6f60f5f8dd4ab5"
)
"""What Tink's own library wrote in segments of 80 bytes, as in `test_tink.py`, which needs Tink."""
MODEL, TOKENIZER = tiny_llama(), tiny_tokenizer()
TEXTS = [text_of(20, seed=seed) for seed in range(4)]
PROMPT = "Read: " + " ".join(TEXTS) + " So?"


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny blob has a dozen of them."""
    monkeypatch.setattr(sealing, "SEGMENT_BYTES", 100)


def opened(data: bytes, encryption_key: EncryptionKey | None = MINE, key: str = key_of(1)) -> Any:
    return decode_file(data, key=key, fingerprint=FINGERPRINT, encryption_key=encryption_key)[1]


def put(store: DiskStore, seed: int) -> Path:
    store.put(key_of(seed), make_cache(seed), fingerprint=FINGERPRINT)
    return store.files.path(key_of(seed))


def get(store: DiskStore, seed: int) -> tuple[Any, bool]:
    return store.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))


def decrypted_by_hand(data: bytes, secret: bytes, key: str, segment_bytes: int) -> bytes:
    """The documented layout, read with HMAC from the standard library and one-shot AES-GCM."""
    magic, key_id, header_bytes, salt, prefix = struct.unpack("<8s16sB32s7s", data[:64])
    assert (magic, header_bytes) == (b"PKVSEAL1", 40)

    def hkdf(salt: bytes, info: bytes, length: int) -> bytes:
        extracted = hmac.digest(salt or bytes(32), secret, "sha256")
        return hmac.digest(extracted, info + b"\x01", "sha256")[:length]

    assert key_id == hkdf(b"", b"prophetkv-rag key id", 16)
    cipher = aead.AESGCM(hkdf(salt, data[:24] + key.encode(), 32))
    plain, at, number = b"", 64, 0
    while at < len(data):
        end = min(24 + (number + 1) * segment_bytes, len(data))
        nonce = prefix + number.to_bytes(4, "big") + (b"\1" if end == len(data) else b"\0")
        plain += cipher.decrypt(nonce, data[at:end], b"")
        at, number = end, number + 1
    return plain


@pytest.mark.parametrize("segment_bytes", [57, 100, 1 << 20])
def test_it_is_the_documented_layout(monkeypatch: pytest.MonkeyPatch, segment_bytes: int) -> None:
    monkeypatch.setattr(sealing, "SEGMENT_BYTES", segment_bytes)
    sealed = seal(PLAIN, MINE, key=key_of(1))
    assert decrypted_by_hand(sealed, SECRET, key_of(1), segment_bytes) == PLAIN
    assert_same(opened(sealed), make_cache(1))
    assert sealing.unseal(sealed, MINE, key=key_of(1)) == PLAIN


def test_what_tink_wrote_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SEGMENT_BYTES", 80)
    assert sealing.unseal(TINKS, MINE, key="ab" * 32) == b"what Tink 1.16.1 wrote, in two segments"


@pytest.mark.parametrize("plain", [b"", b"x"])
def test_the_smallest_blobs_are_proven_too(plain: bytes) -> None:
    sealed = seal(plain, MINE, key=key_of(1))
    assert sealing.unseal(sealed, MINE, key=key_of(1)) == plain
    with pytest.raises(BlobError, match="segment 0"):
        sealing.unseal(sealed[:-1] + bytes([sealed[-1] ^ 1]), MINE, key=key_of(1))


@pytest.mark.parametrize("blob_format", get_args(BlobFormat))
def test_every_format_comes_back_as_it_does_without_a_key(tmp_path: Path, blob_format: BlobFormat) -> None:
    plain = DiskStore(tmp_path / "plain", 0, blob_format=blob_format)
    sealed = DiskStore(tmp_path / "sealed", 0, blob_format=blob_format, encryption_key=SECRET)
    for store in (plain, sealed):
        for seed in (1, 2):
            put(store, seed)
    for seed in (1, 2):
        assert_same(get(sealed, seed)[0], get(plain, seed)[0])
    assert sealed.files.path(key_of(1)).read_bytes()[:8] == b"PKVSEAL1"
    assert sealed.stats().nbytes == sum(path.stat().st_size for path in sealed.files.all_files())
    assert sealed.verify().num_faults == 0


def test_every_flipped_bit_is_noticed() -> None:
    sealed = seal(PLAIN, MINE, key=key_of(1))
    for offset in range(len(sealed)):
        for bit in range(8) if offset < CLEAR_BYTES + HEADER_BYTES else (offset % 8,):
            damaged = bytearray(sealed)
            damaged[offset] ^= 1 << bit
            with pytest.raises(BlobError):
                opened(bytes(damaged))


def test_truncated_at_any_length_or_lengthened_is_refused() -> None:
    sealed = seal(PLAIN, MINE, key=key_of(1))
    longer = [sealed + more for more in (b"\0", sealed[-16:], sealed[-100:], sealed[-116:])]
    for data in [sealed[:length] for length in range(len(sealed))] + longer:
        with pytest.raises(BlobError):
            opened(data)


def test_segments_fit_nowhere_else() -> None:
    """Swapped within a blob, or taken from another writing of the very same cache."""
    one, two = seal(PLAIN, MINE, key=key_of(1)), seal(PLAIN, MINE, key=key_of(1))
    first, second = CLEAR_BYTES + 100, CLEAR_BYTES + 200
    swapped = one[:first] + one[second : second + 100] + one[first:second] + one[second + 100 :]
    mixed = one[:first] + two[first:]
    for data in (swapped, mixed, one[: CLEAR_BYTES + HEADER_BYTES] + two[CLEAR_BYTES + HEADER_BYTES :]):
        assert len(data) == len(one)
        with pytest.raises(BlobError, match="segment"):
            opened(data)


@pytest.mark.parametrize("left_out", ["the last", "all but the first", "one in the middle"])
def test_segments_left_out_are_noticed_by_the_segments_themselves(left_out: str) -> None:
    """Also where nobody knows how long the blob should be, which its header would tell."""
    data = seal(PLAIN, MINE, key=key_of(1))
    last = CLEAR_BYTES + 100 * ((len(data) - CLEAR_BYTES - 1) // 100)
    middle = CLEAR_BYTES + 500
    cut = {
        "the last": data[:last],
        "all but the first": data[: CLEAR_BYTES + 100],
        "one in the middle": data[:middle] + data[middle + 100 :],
    }[left_out]
    with pytest.raises(BlobError, match="segment"):
        sealing.unseal(cut, MINE, key=key_of(1))


def test_swapped_and_renamed_blobs_are_refused() -> None:
    with pytest.raises(BlobError, match="another chunk"):
        opened(seal(PLAIN, MINE, key=key_of(2)))
    # Sealed under the right name by somebody who has the key, but another chunk within.
    with pytest.raises(BlobError, match="its key is"):
        opened(seal(PLAIN, MINE, key=key_of(2)), key=key_of(2))


def test_random_damage_never_gives_a_cache() -> None:
    generator = random.Random(5)
    blobs = [seal(PLAIN, MINE, key=key_of(1)) for _ in range(3)]
    for _ in range(1500):
        data = bytearray(generator.choice(blobs))
        place, length = generator.randrange(len(data)), generator.choice([1, 2, 8, 100, 116])
        kind = generator.randrange(4)
        if kind == 0:
            del data[place : place + length]
        elif kind == 1:
            data[place:place] = generator.randbytes(length)
        elif kind == 2:
            data[place : place + length] = generator.randbytes(len(data[place : place + length]))
        else:
            data[place : place + length] = generator.choice(blobs)[place : place + length]
        if bytes(data) not in blobs:
            with pytest.raises(BlobError):
                opened(bytes(data))


@pytest.mark.parametrize("intact", [CLEAR_BYTES + HEADER_BYTES, 10_000], ids=["start", "whole blob"])
@pytest.mark.parametrize("file_bytes", [1 << 32, 1 << 42])
def test_a_huge_file_takes_no_memory(tmp_path: Path, intact: int, file_bytes: int) -> None:
    """Sparse, so that it is easily made. What is intact is the true beginning of a blob."""
    store = DiskStore(tmp_path, 0, encryption_key=SECRET)
    path = put(store, 1)
    path.write_bytes(path.read_bytes()[:intact])
    with path.open("r+b") as file:
        file.truncate(file_bytes)
    tracemalloc.start()
    with pytest.raises(BlobError):
        store.files.read(key_of(1), fingerprint=FINGERPRINT)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("claim", [1 << 24, 1 << 40, (1 << 64) - 1])
def test_a_huge_header_within_takes_no_memory(claim: int) -> None:
    tracemalloc.start()
    with pytest.raises(BlobError, match="its header says"):
        opened(seal(claim.to_bytes(8, "little") + PLAIN[8:], MINE, key=key_of(1)))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("secret", [None, SECRET], ids=["no key", "key"])
def test_any_bytes_are_a_bad_blob_and_no_other_error(secret: bytes | None) -> None:
    generator = random.Random(7)
    key = None if secret is None else EncryptionKey(secret)
    start = seal(PLAIN, MINE, key=key_of(1))[: CLEAR_BYTES + HEADER_BYTES]
    for _ in range(1500):
        kept = generator.choice([0, 8, CLEAR_BYTES, CLEAR_BYTES + 1, len(start)])
        size = generator.choice([0, 1, 15, 16, 17, 44, 100, 116, generator.randrange(2000)])
        with pytest.raises(BlobError):
            opened(start[:kept] + generator.randbytes(size), key)


def test_no_nonce_is_used_twice_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 1,000 writings of one cache; read back by hand, so that the nonces are the ones really used."""
    used: list[tuple[bytes, bytes]] = []
    derive, nonce, keys = EncryptionKey.derive, sealing._nonce, [b""]

    def derive_and_note(self: EncryptionKey, *arguments: Any) -> bytes:
        keys[0] = derive(self, *arguments)
        return keys[0]

    def nonce_and_note(*arguments: Any) -> bytes:
        used.append((keys[0], nonce(*arguments)))
        return nonce(*arguments)

    monkeypatch.setattr(EncryptionKey, "derive", derive_and_note)
    monkeypatch.setattr(sealing, "_nonce", nonce_and_note)
    sealed = {seal(PLAIN, MINE, key=key_of(1)) for _ in range(1000)}
    assert len(sealed) == 1000
    assert len(set(used)) == len(used) >= 10_000
    assert all(decrypted_by_hand(data, SECRET, key_of(1), 100) == PLAIN for data in list(sealed)[:20])


def test_neither_the_key_nor_what_the_caches_say_is_on_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    needles = {
        "ids": make_cache(1, 64).input_ids.numpy().tobytes()[:64],
        "values": make_cache(1, 64).values[1].numpy().tobytes()[:64],
        "keys": make_cache(1, 64).keys[0].numpy().tobytes()[-64:],
    }
    secrets = [SECRET, SECRET.hex().encode(), SECRET.hex().upper().encode(), base64.b64encode(SECRET)]
    found = {}
    for name, key in (("plain", None), ("sealed", SECRET)):
        store = DiskStore(tmp_path / name, 0, encryption_key=key)
        store.put(key_of(1, 64), make_cache(1, 64), fingerprint=FINGERPRINT)
        assert store.get(key_of(1, 64), fingerprint=FINGERPRINT, input_ids=ids_of(1, 64))[0] is not None
        export_caches(store, tmp_path / name / "export.tar")
        store.close()
        on_disk = b"".join(path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file())
        found[name] = {what for what, needle in needles.items() if needle in on_disk}
        assert not any(secret in on_disk for secret in secrets)
    assert found == {"plain": set(needles), "sealed": set()}
    shown = caplog.text + repr(MINE) + str(MINE) + f"{load_key(SECRET)!r}"
    assert MINE.id in shown
    assert not any(secret.decode("latin-1") in shown for secret in secrets)
    assert not any(hashlib.new(name, SECRET).hexdigest()[:16] in MINE.id for name in ("sha256", "sha1", "md5"))


@pytest.mark.parametrize("given", [None, OTHER_SECRET], ids=["no key", "another key"])
def test_without_the_right_key_nothing_is_used_written_or_destroyed(
    tmp_path: Path, given: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = DiskStore(tmp_path, 0, encryption_key=SECRET)
    put(store, 1)
    store.close()
    before = {path: path.read_bytes() for path in (tmp_path / "blobs").rglob("*") if path.is_file()}
    with caplog.at_level(logging.WARNING):
        locked = DiskStore(tmp_path, 1 << 20, encryption_key=given)
        assert get(locked, 1) == (None, False)
        put(locked, 1)
        put(locked, 2)
        locked.put_soon(key_of(3), make_cache(3), fingerprint=FINGERPRINT)
        locked.flush()
        assert_same(get(locked, 2)[0], make_cache(2))  # from RAM
        locked.read_ahead([key_of(1)], fingerprint=FINGERPRINT)
        locked.flush()
    assert len(caplog.records) == 1
    assert MINE.id in caplog.text
    assert (OTHER.id in caplog.text) == (given is not None)
    assert not locked.accepts_new()
    for look in (locked.verify, lambda: import_caches(locked, tmp_path / "x.tar")):
        with pytest.raises(InputError, match=MINE.id):
            look()
    locked.close()
    assert before == {path: path.read_bytes() for path in (tmp_path / "blobs").rglob("*") if path.is_file()}
    again = DiskStore(tmp_path, 0, encryption_key=SECRET)
    assert_same(get(again, 1)[0], make_cache(1))
    again.close()
    (tmp_path / "catalog.sqlite").unlink()
    with pytest.raises(StoreError, match=MINE.id):  # a catalog made without the key would lose every blob
        DiskStore(tmp_path, 0, encryption_key=given)
    assert_same(get(DiskStore(tmp_path, 0, encryption_key=SECRET), 1)[0], make_cache(1))


def test_a_blob_of_another_key_in_a_store_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DiskStore(tmp_path, 0, encryption_key=SECRET)
    path = put(store, 1)
    path.write_bytes(seal(PLAIN, OTHER, key=key_of(1)))
    with caplog.at_level(logging.WARNING):
        assert get(store, 1) == (None, True)
    assert OTHER.id in caplog.text
    store.flush()  # a thread drops it
    assert not path.exists()
    put(store, 1)
    assert_same(get(store, 1)[0], make_cache(1))


def test_a_plain_blob_in_an_encrypted_store_is_not_believed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 0, encryption_key=SECRET)
    path = put(store, 1)
    path.write_bytes(PLAIN)
    assert store.verify().bad == (key_of(1),)
    assert get(store, 1) == (None, True)
    put(store, 1)
    assert path.read_bytes()[:8] == b"PKVSEAL1"


def test_a_stray_encrypted_blob_in_a_plain_store_is_left_alone(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 0)
    path = put(store, 1)
    path.write_bytes(seal(PLAIN, MINE, key=key_of(1)))
    assert get(store, 1) == (None, False)
    put(store, 1)
    assert path.read_bytes()[:8] == b"PKVSEAL1"
    with pytest.raises(LockedBlobError, match="no key"):
        store.files.read(key_of(1), fingerprint=FINGERPRINT)


def test_without_the_package_an_encrypted_blob_is_locked_and_a_key_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sealed = seal(PLAIN, MINE, key=key_of(1))
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])  # where it would be found again
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(LockedBlobError, match="no key"):
        opened(sealed, None)
    with pytest.raises(InputError, match=r"prophetkv-rag\[encryption\]"):
        EncryptionKey(SECRET)


def test_a_key_on_caches_in_clear(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = DiskStore(tmp_path, 0)
    put(plain, 1)
    put(plain, 2)
    plain.close()
    with caplog.at_level(logging.WARNING):
        store = DiskStore(tmp_path, 0, encryption_key=SECRET)
    assert "in clear" in caplog.text
    assert get(store, 1) == (None, True)
    store.flush()  # a thread drops it
    assert store.verify(repair=True).bad == (key_of(2),)
    assert not [path for path in store.files.all_files() if path.suffix == ".safetensors"]


def test_clearing_makes_the_directory_anybodys_again(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 0, encryption_key=SECRET)
    put(store, 1)
    store.close()
    locked = DiskStore(tmp_path, 0)
    assert clear(locked, "another namespace") == 0
    assert DiskStore(tmp_path, 0).files.locked_by is not None
    assert clear(locked) == 1
    locked.close()
    store = DiskStore(tmp_path, 0, encryption_key=OTHER_SECRET)
    put(store, 1)
    assert_same(get(store, 1)[0], make_cache(1))


def test_a_damaged_note_of_the_key_opens_nothing(tmp_path: Path) -> None:
    DiskStore(tmp_path, 0, encryption_key=SECRET).close()
    (tmp_path / "encryption-key-id").write_bytes(b"")
    for key in (None, SECRET):
        with pytest.raises(StoreError, match="encryption-key-id"):
            DiskStore(tmp_path, 0, encryption_key=key)


def test_a_lost_catalog_is_made_again_with_the_key(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 0, encryption_key=SECRET)
    for seed in (1, 2):
        put(store, seed)
    store.close()
    (tmp_path / "catalog.sqlite").unlink()
    store = DiskStore(tmp_path, 0, encryption_key=SECRET)
    assert store.stats().chunks == 2
    assert_same(get(store, 2)[0], make_cache(2))


def test_caches_move_from_key_to_key(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "old", 0, encryption_key=SECRET)
    for seed in (1, 2, 3):
        put(store, seed)
    file = tmp_path / "export.tar"
    assert export_caches(store, file) == 3
    with tarfile.open(file) as archive:
        members = [archive.extractfile(member).read() for member in archive]  # type: ignore[union-attr]
    assert all(data[:8] == b"PKVSEAL1" for data in members)

    new = DiskStore(tmp_path / "new", 0, encryption_key=OTHER_SECRET)
    assert len(import_caches(new, file).refused) == 3  # not the new key's, and not said to be another's
    assert import_caches(new, file, source_key=MINE).added == 3
    assert_same(get(new, 2)[0], make_cache(2))
    assert new.verify().num_faults == 0
    same = DiskStore(tmp_path / "same", 0, encryption_key=SECRET)
    assert import_caches(same, file).added == 3
    assert_same(get(same, 3)[0], make_cache(3))


def test_the_key_of_a_whole_directory_is_changed(tmp_path: Path) -> None:
    """From none to one to another to none; a bad blob is dropped, the limit holds, and the order of eviction stays."""
    store = DiskStore(tmp_path, 0)
    for seed in (1, 2, 3):
        put(store, seed)
    plain = {seed: store.files.path(key_of(seed)).read_bytes() for seed in (1, 2, 3)}
    for _ in range(3):
        assert_same(get(store, 2)[0], make_cache(2))
    store.files.path(key_of(1)).write_bytes(b"damaged")
    store.close()
    store = DiskStore(tmp_path, 0, max_bytes=3 * len(plain[1]))
    assert rekey(store, MINE) == RekeyReport(changed=2, dropped=1)
    put(store, 4)  # three encrypted blobs have no room: it, or the one that was never used, is not kept
    assert sum(path.stat().st_size for path in store.files.all_files()) <= 3 * len(plain[1])
    store.close()
    assert DiskStore(tmp_path, 0).files.locked_by is not None

    store = DiskStore(tmp_path, 0, encryption_key=SECRET)
    assert_same(get(store, 2)[0], make_cache(2))
    with pytest.raises(InputError, match=MINE.id):
        rekey(DiskStore(tmp_path, 0), OTHER)
    assert rekey(store, OTHER).dropped == 0
    assert_same(get(store, 2)[0], make_cache(2))
    store.close()
    store = DiskStore(tmp_path, 0, encryption_key=OTHER_SECRET)
    assert store.verify().num_faults == 0
    rekey(store, None)
    store.close()
    store = DiskStore(tmp_path, 0)
    assert_same(get(store, 2)[0], make_cache(2))
    assert store.files.path(key_of(2)).read_bytes() == plain[2]


def test_plain_caches_are_taken_in_only_if_that_is_said(tmp_path: Path) -> None:
    plain = DiskStore(tmp_path / "plain", 0)
    put(plain, 1)
    export_caches(plain, tmp_path / "plain.tar")
    store = DiskStore(tmp_path / "sealed", 0, encryption_key=SECRET)
    assert len(import_caches(store, tmp_path / "plain.tar").refused) == 1
    assert import_caches(store, tmp_path / "plain.tar", is_plain=True).added == 1
    assert store.files.path(key_of(1)).read_bytes()[:8] == b"PKVSEAL1"
    assert_same(get(store, 1)[0], make_cache(1))
    export_caches(store, tmp_path / "sealed.tar")
    assert len(import_caches(DiskStore(tmp_path / "third", 0), tmp_path / "sealed.tar").refused) == 1


def test_answers_are_the_same_and_caches_are_reused(tmp_path: Path) -> None:
    config = ProphetKVConfig(recompute_ratio=0.2)
    plain = ProphetKVEngine(MODEL, TOKENIZER, config=config, store=DiskStore(tmp_path / "plain", 0))
    plain.add_chunks(TEXTS)
    wanted = plain.prefill(PROMPT)

    def ask(secret: bytes) -> list[str]:
        store = DiskStore(tmp_path / "sealed", 0, encryption_key=secret)
        engine = ProphetKVEngine(MODEL, TOKENIZER, config=config, store=store)
        engine.add_chunks(TEXTS)
        result = engine.prefill(PROMPT)
        assert result.logits.equal(wanted.logits)
        assert result.recomputed.equal(wanted.recomputed)
        store.close()
        return [chunk.status for chunk in result.report.chunks]

    assert ask(SECRET) == ["hit"] * 4
    assert ask(OTHER_SECRET) == ["miss"] * 4
    blobs = sorted((tmp_path / "sealed" / "blobs").rglob("*.safetensors"))
    data = blobs[0].read_bytes()
    blobs[0].write_bytes(blobs[1].read_bytes())
    blobs[1].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert sorted(ask(SECRET)) == ["corrupt", "corrupt", "hit", "hit"]


def test_blobs_are_read_ahead(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 1 << 20, encryption_key=SECRET)
    put(store, 1)
    store.drop_from_memory([key_of(1)])
    store.read_ahead([key_of(1)], fingerprint=FINGERPRINT)
    store.flush()
    store.files.path(key_of(1)).unlink()
    assert_same(get(store, 1)[0], make_cache(1))


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
@pytest.mark.parametrize(("mode", "is_private"), [(0o600, True), (0o400, True), (0o640, False), (0o604, False)])
def test_a_key_file_is_its_owners_alone(tmp_path: Path, mode: int, is_private: bool) -> None:
    for number, content in enumerate([SECRET, SECRET.hex().encode() + b"\n"]):
        path = tmp_path / str(number)
        path.write_bytes(content)
        path.chmod(mode)
        if is_private:
            assert load_key(path) == load_key(str(path)) == MINE
        else:
            with pytest.raises(InputError, match="chmod 600") as caught:
                DiskStore(tmp_path / "db", 0, encryption_key=path)
            assert SECRET.hex() not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"x" * 31, SECRET.hex().encode()[:-2], b"zz" * 32, SECRET + b"\n\n"])
def test_what_is_no_key_is_refused_without_being_shown(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match="holds no key") as caught:
        load_key(path)
    assert not content or content.decode("latin-1") not in str(caught.value)
    with pytest.raises(InputError, match="bytes"):
        load_key(content)
    if content and b"\0" not in content:
        monkeypatch.setenv(KEY_VARIABLE, content.decode("ascii"))
        with pytest.raises(InputError, match=KEY_VARIABLE):
            load_key()


def test_the_key_comes_from_the_environment_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_key() is None
    monkeypatch.setenv(KEY_VARIABLE, SECRET.hex())
    assert load_key() == MINE
    assert load_key(OTHER_SECRET) == OTHER
    store = DiskStore(tmp_path, 0)
    assert put(store, 1).read_bytes()[:8] == b"PKVSEAL1"


def test_a_new_key_is_random_private_and_written_once(tmp_path: Path) -> None:
    keys = {write_new_key(tmp_path / name).id for name in "abc"}
    assert len(keys) == 3
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    found = load_key(tmp_path / "a")
    with pytest.raises(InputError, match="not written over"):
        write_new_key(tmp_path / "a")
    assert load_key(tmp_path / "a") == found


def test_a_key_is_neither_shown_nor_pickled() -> None:
    assert repr(MINE) == f"EncryptionKey(id='{MINE.id}')"
    with pytest.raises(TypeError):
        pickle.dumps(MINE)
    assert MINE == EncryptionKey(SECRET) != OTHER
    assert not hasattr(MINE, "__dict__")


def test_tensors_of_many_segments_and_segments_of_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some megabytes, so that the real segment size cuts tensors."""
    monkeypatch.setattr(sealing, "SEGMENT_BYTES", 1 << 20)
    cache = make_cache(4, 3000, num_layers=12)
    blob = encode_blob(cache, key=key_of(4, 3000), fingerprint=FINGERPRINT)
    assert len(blob) > 2 << 20
    assert_same(opened(seal(blob, MINE, key=key_of(4, 3000)), key=key_of(4, 3000)), cache)


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
@pytest.mark.parametrize("left", [0.5, 0.999])
def test_a_file_that_is_cut_while_it_is_read_is_no_cache(
    tmp_path: Path, secret: bytes | None, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header, and the first layers, were good. (Mapped, this would end the process.)"""
    store = DiskStore(tmp_path, 0, encryption_key=secret)
    path = put(store, 1)
    parse, pending = blob_file.parse_header, [1]

    def parse_and_cut(*arguments: Any) -> Any:
        if pending:
            pending.pop()
            os.truncate(path, int(left * path.stat().st_size))
        return parse(*arguments)

    monkeypatch.setattr(blob_file, "parse_header", parse_and_cut)
    assert get(store, 1) == (None, True)
    assert not pending
    store.flush()  # a thread drops it
    assert not path.exists()
    put(store, 1)
    assert_same(get(store, 1)[0], make_cache(1))
