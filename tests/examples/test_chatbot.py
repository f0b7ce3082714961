"""The chatbot's server on a tiny model: documents and their caches, conversations, and every kind of bad input."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient

from prophetkv_rag.defaults.wheel_fetch import write_source
from prophetkv_rag.errors import InputError
from tests.examples.searching import ASKED, MUSEUM, save_taught
from tests.tiny import save_tiny, save_tiny_encoder, text_of

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "chatbot_llama_index"
QUESTION = {"question": "When does the museum open?"}


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """The example's modules, imported as they are when `app.py` runs."""
    sys.path.insert(0, str(EXAMPLE))
    names = ("knowledge", "agent", "conversation", "web")
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def service(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("chatbot")
    model = save_tiny(directory / "model", max_position_embeddings=4096)
    encoder = save_tiny_encoder(directory / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prophetkv_rag.defaults.fetch_embedding_model", lambda progress=None: encoder)
        service = example["web"].Service()
        knowledge = example["knowledge"].Knowledge(model, directory / "db")
        service.knowledge = knowledge
        service.conversations = example["conversation"].Conversations(knowledge, max_new_tokens=6)
        yield service
        knowledge.close()


@pytest.fixture
def client(example: Any, service: Any) -> Iterator[TestClient]:
    """A client of the page's own origin, on two documents."""
    for document in service.knowledge.documents():
        service.knowledge.delete(document.id)
    service.knowledge.add("one.md", text_of(200, seed=1))
    service.knowledge.add("two.txt", text_of(60, seed=2))
    with TestClient(example["web"].make_app(service), base_url="http://127.0.0.1:8765") as client:
        yield client


def upload(client: TestClient, name: str, content: bytes) -> Any:
    return client.post("/api/documents", files={"file": (name, content)})


def events(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n") if part]


def test_documents_and_their_caches_come_and_go(client: TestClient) -> None:
    before = client.get("/api/state").json()
    assert [document["name"] for document in before["documents"]] == ["one.md", "two.txt"]
    assert sum(document["chunks"] for document in before["documents"]) == before["caches"]["chunks"]
    assert sum(document["nbytes"] for document in before["documents"]) == pytest.approx(
        before["caches"]["nbytes"], abs=5
    )

    added = upload(client, "three.md", text_of(300, seed=3).encode()).json()
    assert added["caches"]["chunks"] > before["caches"]["chunks"]
    [three] = [document for document in added["documents"] if document["name"] == "three.md"]
    assert three["nbytes"] == pytest.approx(added["caches"]["nbytes"] - before["caches"]["nbytes"], rel=0.01)

    replaced = upload(client, "three.md", text_of(30, seed=4).encode()).json()
    assert len(replaced["documents"]) == 3
    assert replaced["caches"]["chunks"] == before["caches"]["chunks"] + 1

    gone = client.delete(f"/api/documents/{three['id']}").json()
    assert gone["deleted"]["name"] == "three.md"
    assert gone["caches"] == before["caches"]
    assert client.delete(f"/api/documents/{three['id']}").status_code == 404


def test_an_answer_is_a_stream_of_events(client: TestClient) -> None:
    found = events(client.post("/api/chat", json=QUESTION | {"compare": True}))
    kinds = [event["type"] for event in found]
    assert kinds[0] == "sources"
    assert kinds[-3:] == ["comparing", "comparison", "done"]
    assert kinds.count("report") == 1
    sources = found[0]["sources"]
    report = next(event for event in found if event["type"] == "report")
    assert report["report"]["reused_tokens"] > 0
    assert len(report["sources"]) == len(sources) >= 2
    for source, shown in zip(sources, report["sources"], strict=True):
        assert "".join(token[0] for token in shown["tokens"]) == source["text"]
        assert shown["status"] == "hit"
        assert sum(token[2] for token in shown["tokens"]) == shown["recomputed"]
    assert sum(shown["recomputed"] for shown in report["sources"]) == report["report"]["recomputed_tokens"]
    assert found[-2]["ttft"] > 0


def test_history_is_kept_per_session_and_bounded(client: TestClient, service: Any, example: Any) -> None:
    first = events(client.post("/api/chat", json=QUESTION))[0]["session"]
    again = events(client.post("/api/chat", json={"question": "And the library?", "session": first}))[0]["session"]
    other = events(client.post("/api/chat", json=QUESTION | {"session": "unknown"}))[0]["session"]
    assert first == again != other
    asked = [entry["text"] for entry in client.get(f"/api/sessions/{first}").json() if entry["role"] == "user"]
    assert asked == ["When does the museum open?", "And the library?"]
    assert service.conversations.knowledge.engine.conversations.stats(first).tokens > 0
    client.delete(f"/api/sessions/{first}")
    assert service.conversations.knowledge.engine.conversations.stats(first).tokens == 0
    assert client.get(f"/api/sessions/{first}").json() == []
    for _ in range(example["conversation"].MAX_SESSIONS + 5):
        service.conversations.session(None)
    assert len(service.conversations._sessions) == example["conversation"].MAX_SESSIONS


def test_history_reaches_the_model(client: TestClient, service: Any) -> None:
    session = events(client.post("/api/chat", json=QUESTION))[0]["session"]
    found = events(client.post("/api/chat", json={"question": "And the library?", "session": session}))
    report = next(event for event in found if event["type"] == "report")["report"]
    alone = next(
        event
        for event in events(client.post("/api/chat", json={"question": "And the library?"}))
        if event["type"] == "report"
    )["report"]
    assert report["prompt_tokens"] > alone["prompt_tokens"]
    assert report["remembered_tokens"] > 0 == alone["remembered_tokens"]  # no other session's conversation is used
    assert report["fresh_tokens"] < alone["fresh_tokens"]  # the same chunks were retrieved, in the same order


@pytest.mark.parametrize("name", ["../evil.md", "/etc/passwd.md", "a\\b.md", ".hidden.md", "x" * 200 + ".md"])
def test_path_like_names_are_refused(client: TestClient, name: str) -> None:
    response = upload(client, name, b"Some text that is long enough.")
    assert response.status_code == 422
    assert "file name" in response.json()["error"]
    assert len(client.get("/api/state").json()["documents"]) == 2


@pytest.mark.parametrize("name", ["a\tb.md", "a\0.md", "..", "", "a\u202e.md"])
def test_names_with_hidden_characters_are_refused(example: Any, name: str) -> None:
    with pytest.raises(InputError, match="plain file name"):
        example["knowledge"].check_name(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("photo.png", b"\x89PNG", "Allowed: .md, .txt"),
        ("noending", b"text", "Allowed"),
        ("latin.txt", "Grüße".encode("latin-1"), "not UTF-8"),
        ("empty.txt", b" \n ", "holds no text"),
        ("binary.txt", b"a\0b", "holds no text"),
        ("broken.pdf", b"%PDF-1.4 nonsense", "PDF"),
        ("large.txt", b"a" * 5_000_001, "larger than 5 MB"),
    ],
)
def test_bad_files_are_refused_with_a_reason(client: TestClient, name: str, content: bytes, message: str) -> None:
    response = upload(client, name, content)
    assert response.status_code == 422
    assert message in response.json()["error"]
    assert len(client.get("/api/state").json()["documents"]) == 2


def test_a_huge_body_is_not_even_read(client: TestClient) -> None:
    response = client.post("/api/documents", content=b"", headers={"content-length": "99999999999"})
    assert response.status_code == 413
    assert "5 MB" in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [({"question": "  "}, 422), ({"question": "x" * 2001}, 422), ({}, 422), ({"question": 7}, 422), ("nonsense", 422)],
)
def test_bad_questions_get_a_message(client: TestClient, body: Any, status: int) -> None:
    response = client.post("/api/chat", json=body)
    assert response.status_code == status
    assert response.json()["error"]


def test_without_documents_the_model_is_not_asked(client: TestClient, service: Any) -> None:
    for document in service.knowledge.documents():
        service.knowledge.delete(document.id)
    response = client.post("/api/chat", json=QUESTION)
    assert response.status_code == 409
    assert "no documents" in response.json()["error"]


def test_other_pages_and_other_hosts_are_refused(client: TestClient) -> None:
    assert client.post("/api/chat", json=QUESTION, headers={"origin": "https://evil.example"}).status_code == 403
    assert client.delete("/api/documents/x", headers={"origin": "http://127.0.0.1:9999"}).status_code == 403
    assert client.get("/api/state", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/api/state", headers={"origin": "http://127.0.0.1:8765"}).status_code == 200


def test_the_page_allows_no_foreign_code(client: TestClient) -> None:
    response = client.get("/")
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
    for name in ("index.html", "style.css", "app.js", "api.js", "dom.js", "documents.js", "source.js"):
        text = (EXAMPLE / "static" / name).read_text("utf-8")
        assert "innerHTML" not in text
        assert "https://" not in text


def test_one_session_answers_one_question_at_a_time(service: Any, client: TestClient) -> None:
    session = service.conversations.session(None)
    answering = service.conversations.answer(session, "When?", compare=False, cancel=threading.Event())
    next(answering)
    found = events(client.post("/api/chat", json=QUESTION | {"session": session.id}))
    assert [event["type"] for event in found] == ["error"]
    assert "still answering" in found[0]["error"]
    answering.close()
    assert events(client.post("/api/chat", json=QUESTION | {"session": session.id}))[-1]["type"] == "done"


def test_a_reader_that_leaves_cancels_the_answer(service: Any, client: TestClient) -> None:
    session, cancel = service.conversations.session(None), threading.Event()
    answering = service.conversations.answer(session, "When?", compare=True, cancel=cancel)
    assert next(answering)["type"] == "sources"
    cancel.set()
    kinds = [event["type"] for event in answering]
    assert "comparison" not in kinds
    assert not session.lock.locked()


def test_a_client_that_goes_away_stops_the_model(service: Any, example: Any, client: TestClient) -> None:
    """Over a real connection: LlamaIndex's own thread would read an answer that nobody wants to its end."""
    steps = 0
    model = service.knowledge.engine.model

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > 20:
            threading.Event().wait(0.05)  # the answer must not come to its end before the client is seen to be gone

    hook = model.register_forward_hook(count)
    before = service.conversations
    service.conversations = example["conversation"].Conversations(service.knowledge, max_new_tokens=700)
    server = uvicorn.Server(uvicorn.Config(example["web"].make_app(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.stream("POST", f"http://127.0.0.1:{port}/api/chat", json=QUESTION, timeout=None) as response:
            found = (json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line)
            session = next(event["session"] for event in found if event["type"] == "sources")
            next(event for event in found if event["type"] == "token")
        held = service.conversations.session(session).lock
        with held:  # the session answers no more
            assert steps < 700
    finally:
        hook.remove()
        server.should_exit = True
        thread.join()
        service.conversations = before


def test_until_the_model_is_loaded_the_page_says_so(example: Any) -> None:
    service = example["web"].Service()
    service.phase = "Loading the model"
    with TestClient(example["web"].make_app(service), base_url="http://localhost") as client:
        assert client.get("/api/state").json()["ready"] is False
        response = client.post("/api/chat", json=QUESTION)
        assert response.status_code == 503
        assert "Loading the model" in response.json()["error"]
        assert client.get("/").status_code == 200


def pdf_of_half_characters() -> bytes:
    """A PDF whose font maps one glyph to half of a surrogate pair, as damaged fonts in real files do."""
    codes = [code for code in range(32, 127) if code != 0x58]
    table = f"{len(codes) + 1} beginbfchar\n<58> <D835>\n" + "".join(f"<{c:02X}> <{c:04X}>\n" for c in codes)
    cmap = (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /A def /CMapType 2 def\n"
        f"1 begincodespacerange <00> <FF> endcodespacerange\n{table}endbfchar\nendcmap end end"
    ).encode()
    page = b"BT /F1 12 Tf 72 720 Td (The energy X of the system is constant, says chapter two.) Tj ET"
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(page), page),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /ToUnicode 6 0 R >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(cmap), cmap),
    ]
    out, offsets = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, part)
    entries = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(parts) + 1)
    end = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(parts) + 1, len(out))
    return out + head + entries + end


def test_a_pdf_with_half_a_character_is_read(client: TestClient) -> None:
    pytest.importorskip("pypdf")
    added = upload(client, "report.pdf", pdf_of_half_characters())
    assert added.status_code == 200, added.text
    found = events(client.post("/api/chat", json={"question": "What of the energy is constant?"}))
    texts = [source["text"] for event in found if event["type"] == "sources" for source in event["sources"]]
    assert any("The energy \ufffd of the system" in text for text in texts)


def test_a_question_cut_off_inside_an_emoji_is_answered_and_remembered(client: TestClient) -> None:
    body = json.dumps({"question": "When does it open? \ud83d"})
    found = events(client.post("/api/chat", content=body, headers={"content-type": "application/json"}))
    assert found[-1]["type"] == "done"
    [session] = [event["session"] for event in found if event["type"] == "sources"]
    assert client.get(f"/api/sessions/{session}").json()[0]["text"].endswith("\ufffd")


def test_one_bad_file_never_keeps_the_others_out(
    example: Any, client: TestClient, service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        b"a-wide.txt": f"{text_of(40, seed=5)} →".encode("utf-16"),
        b"b-caf\xe9.txt": text_of(40, seed=6).encode(),
        b"c-latin.txt": "Grüße".encode("latin-1"),
        b"d-breaks.md": b"A file that breaks something nobody thought of.",
        b"e-good.md": text_of(40, seed=7).encode(),
    }
    for name, content in files.items():
        (tmp_path / os.fsdecode(name)).write_bytes(content)
    real = type(service.knowledge)._split

    def split(self: Any, key: str, name: str, *rest: Any) -> Any:
        if name == "d-breaks.md":
            raise RecursionError
        return real(self, key, name, *rest)

    monkeypatch.setattr(type(service.knowledge), "_split", split)
    service.notes = service.knowledge.add_folder(tmp_path, lambda phase: None)
    state = client.get("/api/state").json()
    listed = {document["name"] for document in state["documents"]}
    assert {"a-wide.txt", "e-good.md"} <= listed
    assert [note.split(":")[0] for note in state["notes"]] == [r"b-caf\xe9.txt", "c-latin.txt", "d-breaks.md"]
    service.notes = []


def test_ctrl_c_ends_the_chat_with_one_word(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "one.txt").write_text("Some text that is long enough to be a chunk of its own.")
    options = ["--port", "0", "--db", str(tmp_path / "db"), "--model", str(model)]
    command = [sys.executable, str(EXAMPLE / "app.py"), str(documents), *options]
    environment = {**os.environ, "PROPHETKV_CACHE_DIR": str(tmp_path / "cache")}
    save_tiny_encoder(tmp_path / "cache" / "models" / "all-MiniLM-L6-v2")
    write_source(tmp_path / "cache" / "models" / "all-MiniLM-L6-v2", "a test")
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as chat:
        seen = ""
        while chat.stdout is not None and "Ready" not in seen and (line := chat.stdout.readline()):
            seen += line
        assert "Ctrl+C ends it" in seen
        chat.send_signal(signal.SIGINT)
        rest = chat.communicate(timeout=120)[0]
    assert (chat.returncode, rest.strip()) == (130, "stopped")


# ---- a model that searches by itself --------------------------------------------------------------------------------


def test_a_model_that_calls_tools_searches_by_itself(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = save_tiny_encoder(tmp_path / "encoder")
    monkeypatch.setattr("prophetkv_rag.defaults.fetch_embedding_model", lambda progress=None: encoder)
    save_taught(tmp_path / "model", example["agent"].AGENT_PROMPT)
    service = example["web"].Service()
    service.knowledge = knowledge = example["knowledge"].Knowledge(tmp_path / "model", tmp_path / "db")
    conversations = example["conversation"].Conversations(knowledge, max_new_tokens=90, tools=True)
    service.conversations = conversations
    with TestClient(example["web"].make_app(service), base_url="http://127.0.0.1:8765") as client:
        client.post("/api/documents", files={"file": ("town.md", MUSEUM.encode())})
        found = events(client.post("/api/chat", json={"question": ASKED}))
        assert (found[0]["type"], found[0]["sources"]) == ("sources", [])
        kinds = [event["type"] for event in found]
        call = next(event for event in found if event["type"] == "call")
        assert (call["name"], call["arguments"]) == ("search_documents", {"query": "museum"})
        assert "".join(event["text"] for event in found[: kinds.index("call")] if "text" in event) == "I look."
        sources = next(event for event in found if event["type"] == "sources" and event["sources"])
        assert [source["file"] for source in sources["sources"]] == ["town.md"]
        last = [event for event in found if event["type"] == "report"][-1]
        assert [source["status"] for source in last["sources"]] == ["hit"]
        assert kinds[-1] == "done"
        told = client.get(f"/api/sessions/{found[0]['session']}").json()
        assert told[0] == {"role": "user", "text": ASKED}
        assert {message["role"] for message in told} == {"user", "assistant"}

        session = conversations.session(None)
        answering = conversations.answer(session, ASKED, compare=False, cancel=threading.Event())
        assert next(answering)["type"] == "sources"
        next(answering)
        answering.close()  # a reader that went away
        assert not session.lock.locked()
    knowledge.close()


def test_a_model_whose_template_shows_no_tools_is_refused(example: Any, service: Any) -> None:
    with pytest.raises(InputError, match="leave --tools out"):
        example["conversation"].Conversations(service.knowledge, tools=True)
