"""A key and a remote tier together: what leaves the machine is encrypted, stays so, and follows a change of the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from prophetkv_rag.store.disk.rekeying import rekey
from prophetkv_rag.store.disk.store import DiskStore
from prophetkv_rag.store.disk.tiered import TieredStore
from prophetkv_rag.store.encryption.sealing import MAGIC, is_sealed, unseal
from prophetkv_rag.store.encryption.user_key import EncryptionKey
from tests.store.caches import FINGERPRINT, assert_same, ids_of, key_of, make_cache
from tests.store.faulty_files import FaultyFileSystem
from tests.store.remote.test_tiered import opened, put, remote_of

MINE, OTHER = EncryptionKey(bytes(range(32))), EncryptionKey(bytes(range(1, 33)))


@pytest.fixture(autouse=True)
def _empty_remote() -> None:
    FaultyFileSystem.clear()


def there() -> dict[str, bytes]:
    """Key -> what the remote holds under it."""
    return {
        name.rpartition("/")[2].partition(".")[0]: bytes(file.getvalue())
        for name, file in FaultyFileSystem.store.items()
    }


def has(store: TieredStore, seed: int) -> bool:
    cache, _ = store.get(key_of(seed), fingerprint=FINGERPRINT, input_ids=ids_of(seed))
    if cache is not None:
        assert_same(cache, make_cache(seed))
    return cache is not None


def test_what_is_there_is_encrypted_and_of_use_with_the_key_only(tmp_path: Path) -> None:
    one = opened(tmp_path / "one", encryption_key=MINE)
    put(one, 1, 2)
    sealed = there()
    assert set(sealed) == {key_of(1), key_of(2)}
    assert all(is_sealed(blob) for blob in sealed.values())
    needle = make_cache(1).keys[0].numpy().tobytes()[:32]
    assert needle in unseal(sealed[key_of(1)], MINE, key=key_of(1))
    assert needle not in sealed[key_of(1)]
    assert has(opened(tmp_path / "friend", encryption_key=MINE), 1)

    # A machine without the key, which has read what is there or not, neither uses it nor puts it in clear.
    stranger = opened(tmp_path / "stranger")
    assert not has(stranger, 1)
    put(stranger, 1, 2, 3)
    assert {key: there()[key] for key in sealed} == sealed
    assert not is_sealed(there()[key_of(3)])
    assert remote_of(stranger).uploads == 1
    # And what it has put there in clear is replaced once somebody with the key has computed it.
    assert not has(one, 3)
    put(one, 3)
    assert is_sealed(there()[key_of(3)])
    assert has(opened(tmp_path / "another", encryption_key=MINE), 3)


def test_a_store_without_its_key_leaves_the_remote_alone(tmp_path: Path) -> None:
    put(opened(tmp_path / "other", encryption_key=MINE), 4)
    put(opened(tmp_path / "one", encryption_key=MINE), 1)
    put(DiskStore(tmp_path / "one", 0, encryption_key=MINE), 6)  # on disk, and not there
    before, calls = there(), sum(FaultyFileSystem.calls.values())
    locked = opened(tmp_path / "one")
    assert locked.files.locked_by is not None
    assert not has(locked, 1)
    assert not has(locked, 4)
    locked.expect([key_of(4)], fingerprint=FINGERPRINT)
    assert locked.bring({key_of(4): (ids_of(4), None)}, fingerprint=FINGERPRINT) == set()
    assert not locked.accepts_new()
    put(locked, 1, 2)
    assert locked.push() == 0
    assert (there(), sum(FaultyFileSystem.calls.values())) == (before, calls)


@pytest.mark.parametrize("has_remote", [True, False])
def test_changing_the_key_changes_what_is_there(tmp_path: Path, has_remote: bool) -> None:
    """Also where the key is changed by a process that was opened without the remote: the next one sees to it."""
    store = opened(tmp_path / "one")
    put(store, 1, 2)
    assert not any(is_sealed(blob) for blob in there().values())
    store.close()
    for old, new in ((None, MINE), (MINE, OTHER), (OTHER, None)):
        before = there()
        changing = (
            opened(tmp_path / "one", encryption_key=old)
            if has_remote
            else DiskStore(tmp_path / "one", 0, encryption_key=old)
        )
        assert rekey(changing, new).changed == 2
        changing.flush()
        changing.close()
        store = opened(tmp_path / "one", encryption_key=new)
        store.push()
        store.flush()
        now = there()
        assert set(now) == set(before)
        assert all(now[key] != before[key] for key in now)
        assert all(blob.startswith(MAGIC) == (new is not None) for blob in now.values())
        assert remote_of(store).waiting == 0
        other = opened(tmp_path / f"other{new and new.id}", encryption_key=new)
        assert has(other, 1)
        assert has(other, 2)
        other.close()
        store.close()
