"""The server as others mount and call it: under a prefix, without a lifespan, by HEAD, from a browser."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from openai import OpenAI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from prophetkv_rag.errors import InputError
from prophetkv_rag.server import ServerSettings, create_app
from tests.server.running import MODEL_NAME, Running, make_engine, messages, running, wait_until

KEY = "sk-right-key"
PAGE = "https://chat.example.com"


def our_app(**settings: Any) -> FastAPI:
    return create_app(make_engine(), ServerSettings(**({"model_name": MODEL_NAME} | settings)))


@contextmanager
def served(app: ASGIApp, **options: Any) -> Iterator[str]:
    """Run any application on a real server; yields its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, log_level="warning", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def in_fastapi(ours: FastAPI) -> ASGIApp:
    main = FastAPI()
    main.mount("/llm", ours)
    return main


def in_starlette(ours: FastAPI) -> ASGIApp:
    return Starlette(routes=[Mount("/llm", routes=[Mount("/deep", ours)])])


def behind_a_middleware(ours: FastAPI) -> ASGIApp:
    main = FastAPI()
    main.mount("/llm", ours)

    @main.middleware("http")
    async def noted(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    return main


WAYS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "fastapi": (in_fastapi, "/llm", {}),
    "starlette": (in_starlette, "/llm/deep", {}),
    "middleware": (behind_a_middleware, "/llm", {}),
    "no_lifespan": (lambda ours: ours, "", {"lifespan": "off"}),
    "proxy": (lambda ours: ours, "", {"root_path": "/api/llm"}),
    "proxy_and_mount": (in_fastapi, "/llm", {"root_path": "/api"}),
}


@pytest.fixture(scope="module", params=WAYS)
def mounted(request: pytest.FixtureRequest) -> Iterator[str]:
    outer, prefix, options = WAYS[request.param]
    ours = our_app(api_keys=(KEY,))
    with served(outer(ours), **options) as url:
        yield url + prefix
    for queue in ours.state.services.queues:
        queue.stop()


def test_openai_s_client_on_a_mounted_server(mounted: str) -> None:
    with OpenAI(base_url=f"{mounted}/v1", api_key=KEY, max_retries=0) as client:
        assert client.models.list().data[0].id == MODEL_NAME
        answer = client.chat.completions.create(model=MODEL_NAME, messages=messages(), max_tokens=4)
        pieces = list(client.chat.completions.create(model=MODEL_NAME, messages=messages(), max_tokens=4, stream=True))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer.choices[0].message.content
        put = httpx.put(f"{mounted}/v1/chunks", json={"chunks": ["One."]}, headers={"Authorization": f"Bearer {KEY}"})
        assert put.status_code == 200, put.text


def test_health_alone_needs_no_key_under_any_prefix(mounted: str) -> None:
    assert httpx.get(f"{mounted}/health").json() == {"status": "ok"}
    assert httpx.head(f"{mounted}/health").status_code == 200
    for path in (
        "/v1/models",
        "/metrics",
        "/v1/chunks",
        "/v1/health",
        "/health/v1/models",
        "//health",
        "/health/../metrics",
    ):
        assert httpx.get(mounted + path).status_code in (401, 404), path
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(mounted + path).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(mounted + path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize("root", ["/health", "/v1", "/health/", "/api/"])
def test_a_prefix_that_looks_like_a_path_opens_nothing(root: str) -> None:
    """The gate reads a path as the router does: what it lets through without a key is `/health` itself."""
    ours = our_app(api_keys=(KEY,))
    main = FastAPI()
    main.mount(root.rstrip("/"), ours)
    for app, options in ((ours, {"root_path": root}), (main, {})):
        with served(app, **options) as url:
            answers = [
                httpx.get(url + start + path)
                for start in ("", root, root.rstrip("/"))
                for path in ("/health", "/v1/models", "/metrics", "/v1/health")
            ]
            opened = [answer for answer in answers if answer.status_code == 200]
            assert opened
            assert all(answer.json() == {"status": "ok"} for answer in opened)


def test_a_path_that_only_begins_like_the_prefix_is_another_path() -> None:
    ours = our_app(api_keys=(KEY,))
    ours.root_path = "/api"  # FastAPI's own setting; the proxy may strip it or not
    with served(ours) as url:
        assert httpx.get(f"{url}/api/health").json() == httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert [httpx.get(url + path).status_code for path in ("/api//health", "/apihealth", "/api/api/health")] == [
            401
        ] * 3


def test_a_lifespan_of_the_outer_application_is_enough() -> None:
    ours = our_app()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with ours.router.lifespan_context(ours):
            yield

    main = FastAPI(lifespan=lifespan)
    main.mount("/llm", ours)
    before = set(threading.enumerate())
    with served(main) as url:
        body = {"model": MODEL_NAME, "messages": messages(), "max_tokens": 2}
        assert httpx.post(f"{url}/llm/v1/chat/completions", json=body, timeout=60).status_code == 200
    assert set(threading.enumerate()) <= before


def test_a_process_ends_though_nobody_stopped_the_threads() -> None:
    code = (
        "import asyncio, httpx\n"
        "from tests.server.test_mounted import in_fastapi, our_app, MODEL_NAME, messages\n"
        "async def main():\n"
        "    app = in_fastapi(our_app())\n"
        "    body = {'model': MODEL_NAME, 'messages': messages(), 'max_tokens': 2}\n"
        "    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url='http://x') as client:\n"
        "        print((await client.post('/llm/v1/chat/completions', json=body)).status_code)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "200"), ended.stderr


PATHS = ("/health", "/metrics", "/v1/models", f"/v1/models/{MODEL_NAME}", "/v1/chunks")


@pytest.mark.parametrize("path", PATHS)
def test_head_is_answered_wherever_get_is(path: str, server: Running) -> None:
    with server.client() as client:
        got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


def test_head_elsewhere(server: Running) -> None:
    with server.client() as client:
        assert client.head("/v1/models/gpt-4").status_code == 404
        assert client.head("/v1/chat/completions").status_code == 405
        schema = client.get("/openapi.json").json()
    assert all("head" not in methods for methods in schema["paths"].values())


def test_web_pages_of_named_origins_may_call() -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-os"}
    with running(make_engine(), api_keys=(KEY,), cors_origins=(PAGE,)) as server, server.client() as client:
        path = "/v1/chat/completions"
        preflight = client.options(path, headers={"Origin": PAGE, **asked})  # browsers send no key with it
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
        for method in ("PUT", "DELETE"):
            again = client.options("/v1/chunks", headers={"Origin": PAGE, "Access-Control-Request-Method": method})
            assert again.status_code == 200
        signed = {"Origin": PAGE, "Authorization": f"Bearer {KEY}"}
        for stream in (False, True):
            answer = client.post(path, json=server.body(stream=stream), headers=signed)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == PAGE
        # Refusals can be read too, and when to come back.
        refused = client.post(path, json=server.body(), headers={"Origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
        assert "Retry-After" in refused.headers["access-control-expose-headers"]
        other = {"Origin": "https://evil.example.com"}
        assert client.options(path, headers=other | asked).status_code == 400
        assert "access-control-allow-origin" not in client.get("/health", headers=other).headers


def test_an_error_nobody_foresaw_can_be_read_by_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a secret of the machine")

    with running(make_engine(), cors_origins=("*",)) as server, server.client() as client:
        monkeypatch.setattr(server.engine, "stream", broken)
        answer = client.post("/v1/chat/completions", json=server.body(), headers={"Origin": PAGE})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["access-control-allow-origin"] == "*"


def test_without_the_setting_no_page_may_read(server: Running) -> None:
    with server.client() as client:
        assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": PAGE}).headers


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "example.com",
        "https://example.com/",
        "https://example.com/page",
        "HTTPS://example.com",
        "https://*@x",
        "http://a b",
        "https://example.com:443",
        "http://example.com:80",
        "https://example.com?x",
        "https://Example.com",
    ],
)
def test_origins_that_no_browser_sends(origin: str) -> None:
    with pytest.raises(InputError, match="no origin as browsers send them"):
        ServerSettings(model_name="m", cors_origins=(origin,))


def test_origins_that_browsers_send() -> None:
    good = (
        "*",
        "null",
        PAGE,
        "http://localhost:3000",
        "http://[::1]:8080",
        "app://obsidian.md",
        "http://example.com:8080",
    )
    assert ServerSettings(model_name="m", cors_origins=good).cors_origins == good
