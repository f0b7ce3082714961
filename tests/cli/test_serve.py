"""`prophetkv-rag serve` as people run it: a process of its own, on a database that `index` made, ended by a signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from prophetkv_rag.cli.app import main
from prophetkv_rag.cli.serve import is_loopback
from tests.server.running import CHUNKS
from tests.tiny import save_tiny, save_tiny_encoder, text_of

KEY = "sk-the-key-itself"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@contextmanager
def serving(*arguments: object, cwd: Path, key: str = "") -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run the command until it listens; yields the process and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PROPHETKV_API_KEY"}
    if key:
        environment["PROPHETKV_API_KEY"] = key
    command = [sys.executable, "-P", "-m", "prophetkv_rag.cli.app", "serve", "--port", "0", "--json"]
    with (cwd / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=log, text=True, cwd=cwd, env=environment
        )
    assert process.stdout is not None
    try:
        printed = ""
        for line in process.stdout:
            printed += line
            if line == "}\n":
                break
        else:
            raise AssertionError((cwd / "log").read_text())
        yield process, json.loads(printed)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(ready: dict[str, Any], *chunks: str, key: str = "none", **more: Any) -> httpx.Response:
    context = "\n\n".join(chunks)
    body = {"model": ready["model"], "messages": [{"role": "user", "content": f"{context}\n\nWhy?"}], "max_tokens": 4}
    return httpx.post(
        f"{ready['url']}/chat/completions", json=body | more, headers={"Authorization": f"Bearer {key}"}, timeout=60
    )


def test_a_database_and_a_clean_end(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = save_tiny_encoder(tmp_path / "encoder")
    monkeypatch.setattr("prophetkv_rag.defaults.fetch_embedding_model", lambda progress=None: encoder)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.txt").write_text(text_of(40, seed=1))
    database = tmp_path / "db"
    indexing = ["index", tmp_path / "docs", "--db", database, "--model", tiny_model, "--json"]
    assert main([str(argument) for argument in indexing]) == 0
    capsys.readouterr()
    with serving("--database", database, cwd=tmp_path) as (process, ready):
        assert ready["url"].startswith("http://127.0.0.1:")
        assert ready["model"] == tiny_model.name
        assert ready["chunks"] == 1
        answer = ask(ready, text_of(40, seed=1).strip()).json()
        assert [chunk["status"] for chunk in answer["prophetkv"]["chunks"]] == ["hit"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        put = httpx.put(f"{ready['url']}/chunks", json={"chunks": CHUNKS[:1]}, timeout=60)
        assert put.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    # What clients registered is still there, beside the database's own.
    with serving("--database", database, "--model-name", "ours", cwd=tmp_path, key=KEY) as (process, ready):
        assert (ready["model"], ready["chunks"]) == ("ours", 2)
        assert ask(ready, CHUNKS[0]).status_code == 401
        answer = ask(ready, CHUNKS[0], key=KEY).json()
        assert [chunk["status"] for chunk in answer["prophetkv"]["chunks"]] == ["hit"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    log = (tmp_path / "log").read_text()
    assert "stopped" in log
    assert "Traceback" not in log


def test_a_key_is_wanted_and_never_printed(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"\n{KEY}\n  second  \n")
    options = ["--model", tiny_model, "--api-key-file", tmp_path / "keys", "--host", "0.0.0.0"]
    options += ["--strategy", "full_reuse", "--cache-dir", tmp_path / "caches", "--max-queue", 0]
    pages = ["https://a.example", "http://localhost:3000"]
    options += ["--cors-origin", pages[0], "--cors-origin", pages[1]]
    with serving(*options, cwd=tmp_path) as (process, ready):
        ready["url"] = ready["url"].replace("0.0.0.0", "127.0.0.1")
        assert ask(ready).status_code == 401
        assert ask(ready, key=KEY).json()["prophetkv"]["strategy"] == "full_reuse"
        assert ask(ready, key="second").status_code == 200
        for page in pages:
            health = httpx.head(ready["url"].replace("/v1", "/health"), headers={"Origin": page})
            assert (health.status_code, health.headers["access-control-allow-origin"]) == (200, page)
        with httpx.stream("GET", ready["url"].replace("/v1", "/health")) as response:
            assert response.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert KEY not in process.stdout.read() + (tmp_path / "log").read_text()
    assert "warning" not in (tmp_path / "log").read_text()
    assert (tmp_path / "caches").is_dir()


def test_chunks_are_encoded_behind_what_prompts_begin_with(tiny_model: Path, tmp_path: Path) -> None:
    """So the first chunk of such a prompt is exact, and a twentieth of the others is recomputed instead of a fifth."""
    (tmp_path / "prompt.txt").write_text("Read this.\n\n{context}\n\n{question}\n")
    ratios = []
    for options in (["--prompt-template", tmp_path / "prompt.txt"], []):
        with serving("--model", tiny_model, *options, cwd=tmp_path) as (_, ready):
            put = httpx.put(f"{ready['url']}/chunks", json={"chunks": CHUNKS[:3], "in_order": True}, timeout=60)
            assert put.status_code == 200
            report = ask(ready, "Read this.", *CHUNKS[:3]).json()["prophetkv"]
            assert len(report["chunks"]) == 3
            ratios.append(report["recompute_ratio"])
    assert ratios == pytest.approx([0.05, 0.2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--database", "nowhere"], "there is no database at nowhere"),
        (["--database", "db", "--cache-dir", "caches"], "leave --cache-dir out"),
        (["--api-key-file", "missing"], "the API keys cannot be read from missing"),
        (["--api-key-file", "empty"], "empty holds no API key"),
        (["--strategy", "magic"], "magic"),
        (["--deadline", "0"], "deadline_s is 0"),
        (["--cors-origin", "chat.example.com"], "'chat.example.com' is no origin as browsers send them"),
        (["--host", "999.1.1.1"], "cannot listen on 999.1.1.1"),
        (["--port", "70000"], "65535"),
        (["--model", "nothing here"], "there is no model"),
        (["--prompt-template", "missing"], "missing cannot be used: No such file"),
        (["--prompt-template", "empty"], "empty cannot be used: prompt_template has no {context}"),
        (["--prompt-template", "wrong.json"], "must be a text, or messages with 'role' and 'content'"),
        (["--prompt-template", "empty", "--database", "db"], "goes without a database"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PROPHETKV_API_KEY", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_hub)
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "wrong.json").write_text('[{"role": "user"}]')
    assert main(["serve", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def _no_hub(self: object, repo_id: str, **options: object) -> None:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    raise ConnectionError


def test_a_port_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "warns"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_an_open_server_without_a_key_warns(
    host: str, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PROPHETKV_API_KEY", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_hub)
    assert main(["serve", "--host", host, "--port", "0", "--model", "nothing here"]) == 2
    assert (f"warning: listening on {host} without an API key" in capsys.readouterr().err) == warns


@pytest.mark.parametrize(
    ("options", "key", "warns"),
    [
        (["*"], "", True),
        (["https://a.example", "*"], "", True),
        (["*"], KEY, False),
        (["https://a.example"], "", False),
    ],
)
def test_a_server_open_to_all_web_pages_warns(
    options: list[str],
    key: str,
    warns: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROPHETKV_API_KEY", key)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_hub)
    origins = [argument for origin in options for argument in ("--cors-origin", origin)]
    assert main(["serve", *origins, "--port", "0", "--model", "nothing here"]) == 2
    assert ("warning: --cors-origin is * and there is no API key" in capsys.readouterr().err) == warns


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "example.org")))
