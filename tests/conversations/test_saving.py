"""Conversations in files: what a restart keeps, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from prophetkv_rag import InputError, Prompt, ProphetKVConfig, ProphetKVEngine, StoreError
from prophetkv_rag.store.disk.store import DiskStore
from tests.conversations.chats import CHUNKS, QUESTIONS, Chat, counted_rows, kept_rows, prompt_ids, user, with_context
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))


def make_engine(store: Any = None, model: Any = None, **settings: Any) -> ProphetKVEngine:
    made = ProphetKVEngine(
        tiny_llama() if model is None else model, tiny_tokenizer(), store=store, config=ProphetKVConfig(**settings)
    )
    made.add_chunks(CHUNKS)
    return made


def talked(engine: ProphetKVEngine, **settings: Any) -> Chat:
    chat = Chat(engine, **settings)
    chat.ask(with_context(QUESTIONS[0]))
    chat.ask(QUESTIONS[1])
    return chat


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.safetensors"


def test_a_conversation_goes_on_after_a_restart_as_if_there_had_been_none(path: Path) -> None:
    """Rows, states and traces are the same, so the next turn takes over, computes and says the same."""
    before, after = make_engine(), make_engine()
    chat = talked(before)
    saved = before.save_conversation(path)
    assert saved == before.conversations.stats().tokens
    assert after.load_conversation(path) == saved
    assert after.conversations.stats() == before.conversations.stats()
    ids = prompt_ids(before, chat.messages)
    (one, rows), (other, loaded) = kept_rows(before, ids), kept_rows(after, ids)
    assert torch.equal(one.states, other.states)
    assert (one.traces, one.prompts) == (other.traces, other.prompts)
    assert len(one.traces) == 3
    for mine, theirs in zip(rows, loaded, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    messages = [*chat.messages, user(QUESTIONS[2])]
    answers = []
    for engine in (before, after):
        with counted_rows(engine) as counted:
            answers.append((engine.generate(messages, max_new_tokens=8), list(counted)))
    (expected, ran), (found, ran_after) = answers
    assert expected.token_ids == found.token_ids
    assert expected.report.remembered_tokens == found.report.remembered_tokens > 0
    assert ran == ran_after
    assert [chunk.status for chunk in found.report.chunks] == ["remembered"] * 3
    again = after.generate(messages, max_new_tokens=8)  # a prompt that is repeated is known as one
    assert again.token_ids == found.token_ids
    assert again.report.fresh_tokens == 1


def test_many_conversations_share_their_beginnings_in_the_file_too(path: Path) -> None:
    before, after = make_engine(), make_engine()
    texts = [f"You are a librarian who knows every book there is. {question}" for question in QUESTIONS[:5]]
    for text in texts:
        before.generate(text, max_new_tokens=2)
    stats = before.conversations.stats()
    assert before.save_conversation(path) == stats.tokens
    after.generate(texts[4], max_new_tokens=2)  # which is in the file as well
    assert after.load_conversation(path) == stats.tokens
    for text in texts:
        assert after.generate(text, max_new_tokens=2).report.fresh_tokens == 1
    parts = [part for root in after.conversations._roots.values() for node in root.below()
             for pair in node.rows for part in pair]  # fmt: skip
    assert sum(part.untyped_storage().nbytes() for part in parts) == stats.nbytes  # no view of the file lives on


def test_only_what_a_prompt_begins_is_written(path: Path) -> None:
    engine, after = make_engine(), make_engine()
    first, second = talked(engine), Chat(engine)
    second.ask("A secret: " + QUESTIONS[3])
    count = engine.save_conversation(path, first.messages)
    assert 0 < count < engine.conversations.stats().tokens
    after.load_conversation(path)
    report = after.generate([*first.messages, user(QUESTIONS[2])], max_new_tokens=2).report
    assert [chunk.status for chunk in report.chunks] == ["remembered"] * 3
    ids = safetensors.torch.load_file(path)["token_ids"].tolist()
    assert "secret" not in engine.tokenizer.decode(ids)
    begun = first.messages[:1]  # what follows belongs to it: its answer, and the second turn
    assert engine.save_conversation(path, begun) >= count
    with pytest.raises(InputError, match=r"nothing that this prompt begins with is remembered of tenant '', so"):
        engine.save_conversation(path, Prompt([7, 7, 7], [], []))


def test_a_tenants_file_is_another_tenants_only_if_somebody_says_so(path: Path) -> None:
    engine, after = make_engine(), make_engine()
    chat = talked(engine, tenant="alice")
    with pytest.raises(InputError, match="nothing is remembered of tenant ''"):
        engine.save_conversation(path)
    engine.save_conversation(path, tenant="alice")
    assert b"alice" not in path.read_bytes()
    after.load_conversation(path, tenant="bob")
    messages = [*chat.messages, user(QUESTIONS[2])]
    found = [after.prefill(messages, remember=True, tenant=name).report.remembered_tokens for name in ("", "bob")]
    assert found[0] == 0 < found[1]


def test_an_empty_tenant_does_not_write_over_a_file(path: Path) -> None:
    engine = make_engine()
    talked(engine)
    engine.save_conversation(path)
    data = path.read_bytes()
    engine.conversations.forget()
    with pytest.raises(InputError, match="is not written"):
        engine.save_conversation(path)
    assert path.read_bytes() == data


_PROCESS = """
import sys, time
from tests.conversations.test_saving import make_engine, talked
from prophetkv_rag.store.disk.store import DiskStore
engine = make_engine(DiskStore(sys.argv[1]))
talked(engine)
print(engine.save_conversation(sys.argv[2]), flush=True)
time.sleep(600)
"""


def test_a_killed_process_left_its_conversation(path: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    command = [sys.executable, "-c", _PROCESS, str(blobs), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        saved = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    assert [found.name for found in tmp_path.iterdir() if found.is_file()] == [path.name]  # no temporary file
    store = DiskStore(blobs)
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=store)  # the chunks come from the directory
    assert engine.load_conversation(path) == saved
    chat = talked(make_engine())
    report = engine.prefill([*chat.messages, user(QUESTIONS[2])], remember=True).report
    assert [chunk.status for chunk in report.chunks] == ["remembered"] * 3
    store.close()


def test_what_was_deleted_since_is_left_out(path: Path) -> None:
    before, after = make_engine(), make_engine()
    chat = talked(before)
    before.save_conversation(path)
    layout = before.read(chat.messages)
    after.remove_chunks([after.key_of(CHUNKS[1])])
    assert after.load_conversation(path) == layout.chunks[1].start
    report = after.prefill([*chat.messages, user(QUESTIONS[2])], remember=True).report
    assert report.remembered_tokens <= layout.chunks[1].start
    empty = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    assert empty.load_conversation(path) == layout.chunks[0].start


def test_a_chunk_deleted_after_loading_takes_its_rows_along(path: Path) -> None:
    before, after = make_engine(), make_engine()
    chat = talked(before)
    before.save_conversation(path)
    after.load_conversation(path)
    after.remove_chunks([after.key_of(CHUNKS[2])])
    assert after.conversations.stats().tokens == before.read(chat.messages).chunks[2].start


def test_the_limit_holds_for_what_is_loaded(path: Path) -> None:
    before = make_engine()
    talked(before)
    saved = before.save_conversation(path)
    row_bytes = before.conversations.stats().nbytes // saved
    after = make_engine(remember_bytes=50 * row_bytes)
    assert 0 < after.load_conversation(path) <= 50
    assert make_engine(remember_bytes=0).load_conversation(path) == 0


def refused(engine: ProphetKVEngine, path: Path) -> str:
    """The message; nothing was loaded."""
    with pytest.raises(InputError) as caught:
        engine.load_conversation(path)
    assert engine.conversations.stats().tokens == 0
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_what_another_engine_saved_is_refused(path: Path) -> None:
    engine = make_engine()
    talked(engine)
    engine.save_conversation(path)
    assert "another model" in refused(make_engine(model=tiny_llama(seed=1)), path)
    assert "another dtype" in refused(make_engine(model=tiny_llama().to(torch.bfloat16)), path)
    assert "another namespace" in refused(make_engine(namespace="other"), path)
    assert "another namespace, encoding" in refused(make_engine(encoding="plain"), path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    assert "another tokenizer" in refused(ProphetKVEngine(tiny_llama(), tokenizer), path)
    assert make_engine().load_conversation(path) > 0


def test_bfloat16_comes_back_as_it_was(path: Path) -> None:
    before, after = (make_engine(model=tiny_llama().to(torch.bfloat16)) for _ in range(2))
    chat = talked(before)
    before.save_conversation(path)
    after.load_conversation(path)
    ids = prompt_ids(before, chat.messages)
    for mine, theirs in zip(kept_rows(before, ids)[1], kept_rows(after, ids)[1], strict=True):
        assert mine[0].dtype == theirs[0].dtype == torch.bfloat16
        assert torch.equal(mine[0], theirs[0])


def test_a_damaged_file_is_refused(path: Path) -> None:
    """Cut off, or one bit changed, anywhere: in the header's length, its names and numbers, and the tensors."""
    engine, other = make_engine(), make_engine()
    talked(engine)
    engine.save_conversation(path)
    data = path.read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert "damaged" in refused(other, path)
    path.write_bytes(data + b"\0")
    assert "damaged" in refused(other, path)
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(0, 8), *range(8, header, 61), *range(header, len(data), 4999), len(data) - 1]
    for place in places:
        for bit in (0, 5):
            broken = bytearray(data)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            message = refused(other, path)
            assert "damaged" in message or "its format is" in message, (place, bit, message)
    path.write_bytes(data)
    assert other.load_conversation(path) > 0


def test_other_files_are_refused(path: Path, tmp_path: Path) -> None:
    engine = make_engine()
    assert "cannot read the conversation file" in refused(engine, path)
    path.write_text("hello")
    assert "no file of conversations" in refused(engine, path)
    safetensors.torch.save_file({"x": torch.zeros(3)}, path)
    assert "no file of conversations" in refused(engine, path)
    safetensors.torch.save_file({"x": torch.zeros(3)}, path, {"format": "prophetkv-conversations", "version": "1"})
    assert "its format is 'prophetkv-conversations' '1'" in refused(engine, path)
    store = DiskStore(tmp_path / "blobs")
    path.write_bytes(store.files.path(make_engine(store).add_chunks(CHUNKS)[0]).read_bytes())
    assert "no file of conversations" in refused(engine, path)
    store.close()


def test_a_file_that_was_made_to_fit_nothing_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a right digest: what nobody's crash makes, but somebody may."""
    import prophetkv_rag.conversations.file as module

    engine = make_engine()
    talked(engine)
    engine.save_conversation(path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as opened:
        metadata = dict(opened.metadata())
    monkeypatch.setattr(module, "_digest", lambda *_: "same")
    metadata["digest"] = "same"
    engine.conversations.forget()

    def check(change: dict[str, Any], told: dict[str, str] | None = None) -> None:
        found = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        safetensors.torch.save_file(found, path, {**metadata, **(told or {})})
        assert "do not fit together" in refused(engine, path)

    check({"keys.0": tensors["keys.0"][:, :-1].contiguous()})
    check({"keys.2": None})
    check({"keys.3": tensors["keys.0"].clone()})
    check({"values.1": tensors["values.1"].half()})
    check({"states": tensors["states"] + 9})
    check({"shifts": tensors["shifts"][:-1].contiguous()})
    check({"shifts": None})
    check({}, {"runs": metadata["runs"].replace(", 1]", ", 9]")})
    check({}, {"runs": "[[0, 5, [], [], 1]]"})
    check({}, {"runs": '[[-1, 5, [[0, ["x"]]], [], 1]]'})
    check({}, {"runs": "{}"})


def test_a_file_is_encrypted_if_the_store_is(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    stores = {
        name: DiskStore(tmp_path / name, encryption_key=key)
        for name, key in {"mine": KEY, "again": KEY, "other": OTHER_KEY}.items()
    }
    engines = {name: make_engine(store) for name, store in stores.items()}
    plain, chat = make_engine(), talked(engines["mine"])
    saved = engines["mine"].save_conversation(path)
    data = path.read_bytes()
    assert b"prophetkv-conversations" not in data
    assert "encrypted with another key" in refused(engines["other"], path)
    assert "encrypted" in refused(plain, path)
    bare = DiskStore(tmp_path / "bare")
    assert "it is encrypted, and no key was given" in refused(make_engine(bare), path)
    for place in (3, 20, 90, len(data) // 2, len(data) - 1):
        broken = bytearray(data)
        broken[place] ^= 4
        path.write_bytes(broken)
        refused(engines["again"], path)
    path.write_bytes(data[:-1])
    refused(engines["again"], path)
    path.write_bytes(data)
    assert engines["again"].load_conversation(path) == saved
    report = engines["again"].prefill([*chat.messages, user(QUESTIONS[2])], remember=True).report
    assert report.remembered_tokens > 0
    talked(plain)
    plain.save_conversation(path)
    engines["again"].conversations.forget()
    assert "it is not encrypted, but this store has a key" in refused(engines["again"], path)
    for store in (*stores.values(), bare):
        store.close()


def test_a_locked_store_writes_nothing_in_clear(path: Path, tmp_path: Path) -> None:
    """Its directory is encrypted, and no key was given: neither blobs nor conversations leave the process."""
    pytest.importorskip("cryptography")
    DiskStore(tmp_path / "blobs", encryption_key=KEY).close()
    store = DiskStore(tmp_path / "blobs")
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), store=store)
    engine.generate(QUESTIONS[0], max_new_tokens=2)
    with pytest.raises(StoreError, match="key"):
        engine.save_conversation(path)
    assert not path.exists()
    store.close()


def test_what_cannot_be_written_leaves_the_old_file(path: Path, tmp_path: Path) -> None:
    engine = make_engine()
    talked(engine)
    engine.save_conversation(path)
    data = path.read_bytes()
    with pytest.raises(StoreError, match="cannot be written to"):
        engine.save_conversation(tmp_path / "no" / "such" / "place")
    path.with_name("taken").mkdir()
    with pytest.raises(StoreError, match="cannot be written to"):
        engine.save_conversation(path.with_name("taken"))
    assert path.read_bytes() == data
    assert sorted(found.name for found in tmp_path.iterdir()) == ["chat.safetensors", "taken"]
    assert path.stat().st_mode & 0o077 == 0 or sys.platform == "win32"


def test_what_is_written_is_one_moments() -> None:
    """A copy: an answer that makes rows better meanwhile changes nothing in it."""
    engine = make_engine()
    talked(engine)
    saved = engine.conversations.copy_of("")
    before = [keys.clone() for keys, _ in saved.rows]
    engine.generate([user(with_context(QUESTIONS[0]))], strategy="full_prefill", max_new_tokens=2)
    better = engine.conversations.copy_of("")
    assert not torch.equal(better.rows[0][0], before[0])
    assert all(torch.equal(one, keys) for one, (keys, _) in zip(before, saved.rows, strict=True))
