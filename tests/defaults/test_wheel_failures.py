"""Fetching when the registry or the connection fails: right bytes or nothing, and words that say why."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.defaults.fetcher import MakeFetcher
from tests.defaults.registry import PINNED, Registry


@pytest.mark.parametrize("installer", ["pip", "uv", "lent pip"])
def test_another_wheel_than_the_pinned_one_is_refused(
    installer: str, registry: Registry, fetcher: MakeFetcher, bare_python: Path, uv_folder: str
) -> None:
    made = fetcher(sys.executable if installer == "pip" else bare_python)
    if installer == "uv":
        made.settings |= {"PATH": uv_folder, "UV_DEFAULT_INDEX": registry.url}
    else:
        made.settings["PIP_INDEX_URL"] = registry.url
    said = made.fetch(replace(PINNED, sha256="0" * 64))
    assert registry.served >= 1
    assert "0" * 64 in said
    assert PINNED.sha256 in said
    assert ("Hash mismatch" if installer == "uv" else "is not the pinned file") in said
    assert not made.is_fetched()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_registry_that_cannot_be_reached_is_named_with_the_reason(
    installer: str, fetcher: MakeFetcher, bare_python: Path, uv_folder: str
) -> None:
    made = fetcher(bare_python, PATH=uv_folder) if installer == "uv" else fetcher(PIP_RETRIES="1")
    said = made.fetch()
    assert said.startswith(f"cannot download tinymodel==1.0 with {installer}: ")
    assert "refused" in said
    assert "is a package registry reachable" in said
    assert not made.is_fetched()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_registry_without_the_package_is_told_apart(
    installer: str, empty_registry: Registry, fetcher: MakeFetcher, bare_python: Path, uv_folder: str
) -> None:
    made = fetcher(PIP_INDEX_URL=empty_registry.url)
    if installer == "uv":
        made = fetcher(bare_python, PATH=uv_folder, UV_DEFAULT_INDEX=empty_registry.url, PIP_NO_INDEX="1")
    said = made.fetch()
    assert ("No matching distribution" if installer == "pip" else "not found in the package registry") in said
    assert "refused" not in said
    assert not made.is_fetched()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_connection_that_breaks_leaves_nothing_and_the_next_fetch_is_whole(
    installer: str, registry: Registry, fetcher: MakeFetcher, bare_python: Path, uv_folder: str
) -> None:
    made = fetcher(PIP_INDEX_URL=registry.url, PIP_RESUME_RETRIES="0")
    if installer == "uv":
        made = fetcher(bare_python, PATH=uv_folder, UV_DEFAULT_INDEX=registry.url, PIP_NO_INDEX="1")
    registry.cut = 100
    assert f"cannot download tinymodel==1.0 with {installer}" in made.fetch()
    assert not made.is_fetched()
    registry.cut = 0
    assert made.fetch() == ""
    assert made.is_fetched()


@pytest.mark.skipif(os.name == "nt", reason="signals of a process group")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_fetch_that_is_stopped_halfway_starts_over(
    number: signal.Signals, registry: Registry, fetcher: MakeFetcher
) -> None:
    made = fetcher(PIP_INDEX_URL=registry.url)
    registry.cut = 1
    registry.stalls.set()
    process = made.start()
    while registry.cut and process.poll() is None:
        time.sleep(0.05)
    assert registry.cut == 0, "the wheel was never asked for"
    os.killpg(process.pid, number)
    process.communicate()
    assert process.returncode != 0
    if number == signal.SIGINT:
        assert not made.is_fetched()
    assert not made.target.exists()
    assert made.fetch() == ""
    assert made.is_fetched()
