"""A blob encrypted at rest, with a key of the user's.

In come a key (`load_key`) and the bytes of a blob; out come bytes that nobody reads or changes without the key. Begin
reading with `user_key.py`, then `sealing.py`.
"""

from prophetkv_rag.store.encryption.sealing import MAGIC, LockedBlobError, Unsealed, is_sealed, seal, unseal
from prophetkv_rag.store.encryption.user_key import EncryptionKey, KeySource, load_key, write_new_key

__all__ = [
    "MAGIC",
    "EncryptionKey",
    "KeySource",
    "LockedBlobError",
    "Unsealed",
    "is_sealed",
    "load_key",
    "seal",
    "unseal",
    "write_new_key",
]
