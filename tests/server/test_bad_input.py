"""Whatever a client sends: an error in OpenAI's shape with the right status, and a server that goes on answering."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.server.running import CHUNKS, MODEL_NAME, Running, make_engine, messages, running, wait_until
from tests.tiny import text_of

CHAT = "/v1/chat/completions"
KEY = "sk-right-key"


@pytest.fixture(autouse=True)
def _alive_afterwards(server: Running) -> Iterator[None]:
    yield
    assert server.ask().status_code == 200
    wait_until(server.is_idle)


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert isinstance(body["error"]["type"], str)
    return dict(body["error"])


def bad(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL_NAME, "messages": messages(CHUNKS[0]), "max_tokens": 4} | changes


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def json_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


WRONG = [
    (bad(model=7), "model", "invalid_type"),
    (bad(model=None), "model", "invalid_type"),
    ({"messages": messages()}, "model", "missing_required_parameter"),
    ({"model": MODEL_NAME}, "messages", "missing_required_parameter"),
    (bad(messages=[]), "messages", "invalid_value"),
    (bad(messages="hello"), "messages", "invalid_type"),
    (bad(messages=["hello"]), "messages.0", "invalid_type"),
    (bad(messages=[{"content": "hello"}]), "messages.0.role", "missing_required_parameter"),
    (bad(messages=[{"role": "pirate", "content": "hello"}]), "messages.0.role", "invalid_value"),
    (bad(messages=[{"role": "user", "content": 5}]), "messages.0.content", "invalid_value"),
    (bad(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages.0.content", "invalid_value"),
    (bad(prophetkv={"strategy": "prophetkv\ud800"}), "prophetkv.strategy", "invalid_value"),
    (bad(stream="yes"), "stream", "invalid_type"),
    (bad(max_tokens="many"), "max_tokens", "invalid_type"),
    (bad(max_tokens="8"), "max_tokens", "invalid_type"),
    (bad(max_tokens=0), "max_tokens", "invalid_value"),
    (bad(max_tokens=1.5), "max_tokens", "invalid_type"),
    (bad(max_tokens=True), "max_tokens", "invalid_type"),
    (bad(max_completion_tokens=-1), "max_completion_tokens", "invalid_value"),
    (bad(temperature=-0.1), "temperature", "invalid_value"),
    (bad(temperature="hot"), "temperature", "invalid_type"),
    (bad(temperature=float("nan")), "temperature", None),
    (bad(top_p=1.1), "top_p", "invalid_value"),
    (bad(seed="x"), "seed", "invalid_type"),
    (bad(seed=2**64), "seed", "invalid_value"),
    (bad(stop=5), "stop", "invalid_type"),
    (bad(stop=[""]), "stop", "invalid_value"),
    (bad(stop=["x"] * 99), "stop", "invalid_value"),
    (bad(stop="\udfff"), "stop", None),
    (bad(n=2), "n", "invalid_value"),
    (bad(logprobs=True), "logprobs", "invalid_value"),
    (bad(tools=[{"type": "function"}]), "tools", "invalid_value"),
    (bad(tools=[{"type": "function", "function": {"description": "x"}}]), "tools", "invalid_value"),
    (bad(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}}), "tool_choice", "invalid_value"),
    (bad(tools=TOOLS, tool_choice="sometimes"), "tool_choice", "invalid_value"),
    (bad(tool_choice="required"), "tool_choice", "invalid_value"),
    (bad(functions=[{"name": "f"}]), "functions", "invalid_value"),
    (bad(tools=TOOLS), None, "invalid_value"),  # the template of this model shows none
    (bad(response_format={"type": "xml"}), "response_format", "invalid_value"),
    (bad(response_format={"type": "json_schema"}), "response_format", "invalid_value"),
    (bad(response_format=json_format({"type": "text"})), None, "invalid_value"),
    (bad(response_format=json_format({"uniqueItems": True})), None, "invalid_value"),
    (bad(response_format=json_format({"properties": {}, "required": ["a"]})), None, "invalid_value"),
    (bad(response_format=json_format({"type": "text"}), stream=True), None, "invalid_value"),
    (bad(stream_options=5), "stream_options", "invalid_type"),
    (bad(prophetkv={"recompute_ratio": 2}), "prophetkv.recompute_ratio", "invalid_value"),
    (bad(prophetkv={"strategy": "magic"}), None, "invalid_value"),
    (bad(prophetkv={"deadline_s": 0}), "prophetkv.deadline_s", "invalid_value"),
    ([], None, "invalid_json"),
    ("text", None, "invalid_json"),
    (None, None, "invalid_json"),
]


@pytest.mark.parametrize(("body", "param", "code"), WRONG, ids=lambda value: str(value)[-60:])
def test_wrong_types_and_values(server: Running, body: Any, param: str | None, code: str | None) -> None:
    bodies = [body, {"stream": True} | body] if isinstance(body, dict) else [body]
    with server.client(headers={"Content-Type": "application/json"}) as client:
        for sent in bodies:
            error = error_of(client.post(CHAT, content=json.dumps(sent)), 400)
            assert error["type"] == "invalid_request_error"
            assert error["param"] == param
            if code is not None:
                assert error["code"] == code


def test_text_cut_off_inside_an_emoji_is_read(server: Running) -> None:
    parts = [{"type": "text", "text": "half a character \ud800"}]
    messages = [{"role": "user", "content": "\ud83d?"}, {"role": "assistant", "content": parts}, *bad()["messages"]]
    with server.client(headers={"Content-Type": "application/json"}) as client:
        for stream in (False, True):
            body = bad(messages=messages, stream=stream, prophetkv={"query": "\ud800?"})
            response = client.post(CHAT, content=json.dumps(body))
            assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b"\xff\xfe\x00", b"[" * 100_000, b'{"model": "tiny", "messages": [}', b"{} {}"],
    ids=["empty", "cut", "text", "bytes", "deep", "malformed", "two"],
)
def test_malformed_json(server: Running, content: bytes) -> None:
    with server.client() as client:
        response = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert error_of(response, 400)["type"] == "invalid_request_error"


def test_a_form_of_a_web_page_is_not_taken_for_json(server: Running) -> None:
    """Browsers send text/plain to any host without asking it; JSON they do not."""
    with server.client() as client:
        response = client.post(CHAT, content=json.dumps(bad()), headers={"Content-Type": "text/plain"})
    assert error_of(response, 400)["code"] == "invalid_json"


def test_unknown_fields_are_ignored(server: Running) -> None:
    with server.client() as client:
        body = bad(user="me", frequency_penalty=0.5, metadata={"a": 1}, never_heard_of=[1], logit_bias=None, n=1)
        assert client.post(CHAT, json=body).status_code == 200
        nulls = bad(stream=None, stop=None, temperature=None, seed=None, tools=None, max_completion_tokens=None)
        assert client.post(CHAT, json=nulls).status_code == 200
        assert client.post(CHAT, json=bad(response_format={"type": "text"}, tools=[])).status_code == 200


def test_unknown_model_path_and_method(server: Running) -> None:
    with server.client() as client:
        error = error_of(client.post(CHAT, json=bad(model="gpt-4")), 404)
        assert error["code"] == "model_not_found"
        assert MODEL_NAME in error["message"]
        assert error_of(client.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"
        assert error_of(client.get("/v1/nowhere"), 404)["code"] == "not_found"
        assert error_of(client.get("/docs"), 404)["code"] == "not_found"
        assert error_of(client.get(CHAT), 405)["code"] == "method_not_allowed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_window(server: Running, stream: bool) -> None:
    with (
        OpenAI(base_url=server.api, api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.chat.completions.create(model=MODEL_NAME, messages=messages(text_of(2500)), stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert "2048" in caught.value.message


def test_bodies_over_the_limit() -> None:
    limit = 20_000
    with running(make_engine(), max_body_bytes=limit) as server, server.client() as client:
        for size in (limit, limit + 200_000, 100 * limit):
            padded = json.dumps(server.body(padding="x" * size))
            # A body beyond what is drained may break the connection before its answer is read.
            if size < 8 * limit:
                assert error_of(client.post(CHAT, content=padded), 413)["code"] == "request_too_large"
        chunked = client.post(CHAT, content=(b"x" * 1000 for _ in range(100)))
        assert error_of(chunked, 413)["code"] == "request_too_large"
        fitting = json.dumps(server.body(padding="x" * (limit - 400)))
        json_type = {"Content-Type": "application/json"}
        assert client.post(CHAT, content=fitting, headers=json_type).status_code == 200
        # A header that promises far too much is answered at once, before any body is sent.
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as raw:
            raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n".encode())
            assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as raw:
            raw.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: nonsense\r\n\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert server.ask().status_code == 200


def test_keys(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with running(make_engine(), api_keys=(KEY, "another")) as server:
        with server.client() as client:
            for wrong in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Basic {KEY}"},
                {"Authorization": KEY},
                {"Authorization": f"Bearer {KEY}x"},
                {"Authorization": "Bearer"},
                {"Authorization": b"Bearer \xff\xfe"},
            ):
                for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("PUT", "/v1/chunks"), ("GET", "/metrics")):
                    response = client.request(method, path, headers=wrong, json=bad())
                    error = error_of(response, 401)
                    assert error["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"] == "Bearer"
                    assert KEY not in response.text
            assert client.get("/health").json() == {"status": "ok"}
        for key in (KEY, "another"):
            with OpenAI(base_url=server.api, api_key=key, max_retries=0) as client:
                answer = client.chat.completions.create(model=MODEL_NAME, messages=messages(), max_tokens=2)
                assert answer.usage.completion_tokens == 2
        with (
            OpenAI(base_url=server.api, api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
    output = capfd.readouterr()
    assert KEY not in output.out + output.err + caplog.text


def test_an_error_nobody_foresaw(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a secret of the machine")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "stream", broken)
        for stream in (False, True):
            error = error_of(server.ask(stream=stream), 500)
            assert error["type"] == "server_error"
            assert "secret" not in error["message"]


def test_an_error_in_the_middle_of_a_stream(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    real = server.engine.stream

    def breaks(*args: Any, **options: Any) -> Any:
        for number, piece in enumerate(real(*args, **options)):
            if number == 2:
                raise RuntimeError("a secret of the machine")
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "stream", breaks)
        response = server.ask(stream=True)
        assert response.status_code == 200
        *_, last, empty = response.text.split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], empty) == ("internal_error", "")
        assert "secret" not in response.text
        with OpenAI(base_url=server.api, api_key="none", max_retries=0) as client, pytest.raises(openai.APIError):
            list(client.chat.completions.create(model=MODEL_NAME, messages=messages(), stream=True))
