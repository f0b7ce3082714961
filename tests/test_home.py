"""A user without a home directory: what needs one says so, and nothing makes a directory that is called `~`."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from prophetkv_rag.defaults import cache_directory
from prophetkv_rag.errors import InputError
from prophetkv_rag.home import expand_user, require_home

NOBODY = "there is none (HOME is not set, and the user id"


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("HOME", "XDG_CACHE_HOME", "PROPHETKV_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)

    def getpwuid(uid: int) -> pwd.struct_passwd:
        msg = f"getpwuid(): uid not found: {uid}"
        raise KeyError(msg)

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("no_home")
def test_the_cache_of_models_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as caught:
        cache_directory()
    assert NOBODY in str(caught.value)
    assert str(os.getuid()) in str(caught.value)
    monkeypatch.setenv("PROPHETKV_CACHE_DIR", "~/models")
    with pytest.raises(InputError, match="PROPHETKV_CACHE_DIR is '~/models'"):
        cache_directory()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("PROPHETKV_CACHE_DIR", str(tmp_path / "models"))
    assert cache_directory() == tmp_path / "models"


@pytest.mark.usefixtures("no_home")
def test_the_systems_own_cache_directory_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "prophetkv_rag"


def test_a_home_is_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    require_home("this test")
    assert expand_user("~/model", what="--model") == tmp_path / "model"
    with pytest.raises(InputError, match="--model is '~no-such-user/model'"):
        expand_user("~no-such-user/model", what="--model")
