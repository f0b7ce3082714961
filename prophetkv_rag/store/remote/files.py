"""Blobs in a place that fsspec reaches: S3, GCS, Azure, SFTP, a mounted share, memory.

    <url>/<fingerprint>/<key>.safetensors       a blob, the same bytes as on disk
    <url>/<fingerprint>/<key>.<random>.tmp      one that is being written, where a rename is what makes it whole

Both names are hex digits made by us, so no path comes from data, and whoever computes the same chunk with the same
model finds it by its name.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prophetkv_rag.errors import BlobError, InputError
from prophetkv_rag.extras import needs
from prophetkv_rag.forks import around_fork
from prophetkv_rag.store import check_key, is_key

logger = logging.getLogger(__name__)

MAX_BLOB_BYTES = 8 << 30
"""No chunk cache is larger; what claims to be is not read."""

_SUFFIX = ".safetensors"
_TEMPORARY = ".tmp"
_WHOLE_OR_NOT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory"}
"""Object stores: what is written appears in one step, there are no directories, and a rename would be a copy."""


@dataclass(frozen=True, slots=True)
class RemoteBlob:
    """A blob as the remote lists it; `key` is "" for what is no blob (half written, or not ours)."""

    path: str
    fingerprint: str
    key: str
    nbytes: int


class RemoteFiles:
    """Reads, writes, lists and removes blobs; nothing is remembered here, and every call may fail in any way.

    The file system is made by the first call, as that may need the network. Safe to use from several threads.

    Args:
        url: Where the blobs are, such as `s3://bucket/prefix`.
        options: Arguments of the fsspec file system, such as credentials.

    Raises:
        InputError: If the URL is none, or its file system needs a package that is missing.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.protocol = _check_url(url)
        self.name = _without_password(url.rstrip("/"))
        """The URL without a password."""
        self._url = url.rstrip("/")
        self._options = dict(options or {})
        self._begin_anew()
        around_fork(self, in_child=RemoteFiles._begin_anew)

    def _begin_anew(self) -> None:
        """Be unopened: a file system's threads and connections are not to be had in a child."""
        self._lock = threading.Lock()
        self._opened: tuple[Any, str] | None = None

    def read(self, fingerprint: str, key: str) -> bytes:
        """Read a blob; `FileNotFoundError` if there is none.

        Raises:
            BlobError: If less came than the remote says there is, or it says more than a blob can be.
        """
        files, root = self._open()
        path = self._path(root, fingerprint, key)
        files.invalidate_cache()  # or it would say what it was when it was listed
        size = files.info(path)["size"]
        if size is None or size > MAX_BLOB_BYTES:  # before memory is taken
            msg = f"the remote says that it has {size} bytes"
            raise BlobError(msg)
        data = bytes(files.cat_file(path))
        if len(data) != size:
            msg = f"{len(data)} of {size} bytes came"
            raise BlobError(msg)
        return data

    def size(self, fingerprint: str, key: str) -> int | None:
        """Return a blob's size, or `None` if there is none."""
        files, root = self._open()
        files.invalidate_cache()
        try:
            return int(files.info(self._path(root, fingerprint, key))["size"])
        except FileNotFoundError:
            return None

    def start(self, fingerprint: str, key: str, num_bytes: int) -> bytes:
        """Read the first bytes of a blob; empty if there is none."""
        files, root = self._open()
        try:
            return bytes(files.cat_file(self._path(root, fingerprint, key), start=0, end=num_bytes))
        except FileNotFoundError:
            return b""

    def write(self, fingerprint: str, key: str, data: bytes) -> None:
        """Write a blob; what a kill leaves half written has another name, or a checksum that says so."""
        files, root = self._open()
        path = self._path(root, fingerprint, key)
        if self.protocol in _WHOLE_OR_NOT:
            files.pipe_file(path, data)
            return
        folder, _, _ = path.rpartition("/")
        temporary = f"{folder}/{key}.{secrets.token_hex(8)}{_TEMPORARY}"
        files.makedirs(folder, exist_ok=True)
        try:
            files.pipe_file(temporary, data)
            files.mv(temporary, path)
        except BaseException:
            self._remove_quietly(files, temporary)
            raise

    def remove(self, fingerprint: str, key: str) -> None:
        """Remove a blob, where it is; with an empty key all of a fingerprint."""
        files, root = self._open()
        try:
            if key:
                files.rm_file(self._path(root, fingerprint, key))
            else:
                files.invalidate_cache()
                files.rm(f"{root}/{check_key(fingerprint)}", recursive=True)
        except FileNotFoundError:
            return

    def blobs(self) -> Iterator[RemoteBlob]:
        """List everything that is there."""
        files, root = self._open()
        files.invalidate_cache()
        for path, info in files.find(root, detail=True).items():
            folder, name = path.rsplit("/", 2)[-2:] if path.count("/") else ("", path)
            key = name.removesuffix(_SUFFIX)
            is_blob = name.endswith(_SUFFIX) and is_key(key) and is_key(folder)
            yield RemoteBlob(path, folder, key if is_blob else "", int(info["size"] or 0))

    def sweep(self, grace_s: float) -> int:
        """Remove what was left half written longer ago than `grace_s`; returns how many files."""
        if self.protocol in _WHOLE_OR_NOT:
            return 0
        files, _ = self._open()
        count = 0
        for found in list(self.blobs()):
            name = found.path.rpartition("/")[2]
            if not found.key and name.endswith(_TEMPORARY) and is_key(name.partition(".")[0]):
                changed = files.info(found.path).get("mtime")
                if isinstance(changed, (int, float)) and changed <= time.time() - grace_s:
                    files.rm_file(found.path)
                    count += 1
        return count

    def _open(self) -> tuple[Any, str]:
        with self._lock:
            if self._opened is None:
                import fsspec

                files, root = fsspec.url_to_fs(self._url, **self._options)
                if self.protocol in ("file", "local"):  # only its owner may read what the chunks say
                    Path(root).mkdir(mode=0o700, parents=True, exist_ok=True)
                self._opened = files, root.rstrip("/")
            return self._opened

    @staticmethod
    def _path(root: str, fingerprint: str, key: str) -> str:
        return f"{root}/{check_key(fingerprint)}/{check_key(key)}{_SUFFIX}"

    @staticmethod
    def _remove_quietly(files: Any, path: str) -> None:
        try:
            files.rm_file(path)
        except Exception:
            logger.debug("%s is left over in the remote tier", path, exc_info=True)


def _without_password(url: str) -> str:
    return re.sub(r"://[^/@]*@", "://", url)


def _check_url(url: str) -> str:
    """Return the protocol; nothing is opened."""
    protocol, separator, rest = url.partition("://")
    url = _without_password(url)
    if not separator or not rest.strip("/") or "::" in url:
        msg = f"{url!r} is no remote tier; give a URL such as s3://bucket/prefix, gs://bucket/prefix or file:///mnt/caches"
        raise InputError(msg)
    if protocol in ("file", "local") and not rest.startswith("/"):
        msg = f"{url!r} would move with the working directory; write the whole path, as in file:///mnt/caches"
        raise InputError(msg)
    with needs("remote", "fsspec", what="a remote tier"):
        import fsspec
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        msg = f"the remote tier {protocol}:// cannot be used: {error}"
        raise InputError(msg) from error
    return protocol
