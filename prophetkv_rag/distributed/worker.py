"""What runs in an actor: a model and a store of its own, and the engine's own code over both.

Its store is the caller's directory on the same machine, or a scratch one without room, in front of the remote tier:
what is computed goes there, and what is there already is not computed. Nothing is downloaded.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prophetkv_rag.distributed.settings import WorkerSettings, own_version
from prophetkv_rag.errors import InputError, ProphetKVError

if TYPE_CHECKING:
    from prophetkv_rag.defaults import MiniLMEmbedder
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.store.disk import DiskStore

R = TypeVar("R")

_RAM_BYTES = 256 << 20  # caches that the next chunks stand behind, where an earlier run computed them
_REMOTE_TIMEOUT_S = 30.0  # nobody waits for an answer here, and what is not read is computed once more
_ROUNDS = 3
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Where a worker runs."""

    host: str
    pid: int
    device: str


@dataclass(frozen=True, slots=True)
class Failed:
    """What a worker answers instead of a result: an error of ours, whose message is for the user."""

    message: str


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Documents to encode.

    Attributes:
        documents: The chunks of each, in order.
        given: Texts among them that another job has encoded, or an earlier run: they stay as they are.
        known: Keys that such caches bear the trace of, and that the caller's store knows.
        embedder: Directory of the embedding model that the texts are embedded with; "" for none.
    """

    documents: tuple[tuple[str, ...], ...]
    given: frozenset[str] = frozenset()
    known: tuple[str, ...] = ()
    embedder: str = ""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a job.

    Attributes:
        computed: Chunks that the model ran for.
        chunks: Chunks in all, each text once, without those that were given.
        not_kept: How many of them are not where all workers find them, and
        reason: why.
        told: What the worker warned of meanwhile.
        vectors: The embeddings of each document's texts, where they were asked for.
    """

    computed: int
    chunks: int
    not_kept: int = 0
    reason: str = ""
    told: tuple[str, ...] = ()
    vectors: tuple[list[list[float]], ...] = ()


class ChunkWorker:
    """One model and one store; made in the actor's process. `call` is all that Ray sees."""

    def __init__(self) -> None:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # read when those libraries are imported
            os.environ[name] = "1"
        self.settings: WorkerSettings | None = None
        self.engine: ProphetKVEngine
        self.store: DiskStore
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._embedder: MiniLMEmbedder | None = None
        self._told = _Warnings()
        logging.getLogger("prophetkv_rag").addHandler(self._told)

    def call(self, function: Callable[[ChunkWorker, Any], R], argument: Any) -> R | Failed:
        """Return what `function` (of a module, as it goes by its name) makes of this worker and its argument."""
        try:
            return function(self, argument)
        except ProphetKVError as error:
            return Failed(f"{self._place()}: {error}")

    def start(self, settings: WorkerSettings, name: str) -> WorkerInfo:
        """Load the model, open the store, and see that both are what the caller has; `name` is what he has left."""
        from prophetkv_rag.distributed.meeting import must_be_here
        from prophetkv_rag.engine import ProphetKVEngine
        from prophetkv_rag.model import device_of, dtype_of, load_model
        from prophetkv_rag.store.disk import must_be_unlocked, open_disk_store

        if own_version() != settings.version:
            msg = (
                f"prophetkv-rag is {own_version()} here and {settings.version} where the caller is; install one version"
            )
            raise InputError(msg)
        model, tokenizer = load_model(settings.model, dtype=dtype_of(settings.dtype), device=device_of(settings.device))
        options = dict(settings.store) | {"ram_bytes": _RAM_BYTES}
        directory = settings.directory
        if directory is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="prophetkv-ray-", ignore_cleanup_errors=True)
            directory = self._scratch.name
            options |= {"max_bytes": 0, "namespace_max_bytes": None}
            options["remote_timeout_s"] = max(_REMOTE_TIMEOUT_S, options.get("remote_timeout_s") or 0)
        self.store = open_disk_store(directory, **options)
        must_be_unlocked(self.store.files)
        self.engine = ProphetKVEngine(model, tokenizer, config=settings.config, store=self.store)
        if self.engine.identity.fingerprint != settings.fingerprint:
            raise InputError(_another_model(self.engine, settings))
        if self.store.remote is not None:
            must_be_here(self.store.remote.files, self.store, settings.fingerprint, name)
        self.settings = settings
        return WorkerInfo(socket.gethostname(), os.getpid(), str(model.device))

    def encode(self, job: EncodeJob) -> Encoded:
        """Encode documents' chunks, and wait until they are where all workers find them."""
        assert self.settings is not None
        engine, store = self.engine, self.store
        for key in set(job.known) - store.known(job.known):
            store.note(key, fingerprint=engine.identity.fingerprint, num_tokens=0, entry=None)
        texts, behind = self._placed(job)
        keys = {engine.key_of(text): text not in job.given for text in texts}
        if store.remote is not None:  # the caller may have deleted there since, or another worker written
            store.drop_from_memory(keys)
            store.remote.records.remove(keys)
        computed, left = 0, list(keys)
        for number in range(_ROUNDS):
            done = 0

            def count(so_far: int, total: int) -> None:
                nonlocal done
                done = so_far

            if texts:
                engine.add_chunks(texts, owner=self.settings.owner, behind=behind, progress=count)
            computed += done
            store.flush()
            left = [key for key in keys if not self._is_there(key)]
            pause_s = 0.0 if store.remote is None else store.remote.writes.wait_s
            if not left or number + 1 == _ROUNDS or not pause_s:
                break
            time.sleep(min(pause_s + 0.1, _LONGEST_PAUSE_S))  # it is left alone for so long after a failure
        why_not, vectors = self._why_not() if left else "", self._embedded(job)
        return Encoded(computed, sum(keys.values()), len(left), why_not, self._told.take(), vectors)

    def close(self, _: None) -> None:
        """Remove what is on this machine."""
        if self.settings is not None:
            self.store.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _placed(self, job: EncodeJob) -> tuple[list[str], list[list[str]] | None]:
        """Return all texts that can be chunks, and for each those before it in its document."""
        count = self.engine.library.encoding.count if self.engine.library.encoding.kind == "previous" else 0
        texts: list[str] = []
        behind: list[list[str]] = []
        for document in job.documents:
            kept = [text for text in document if self._fits(text)]
            texts += kept
            behind += [
                [] if text in job.given else kept[max(0, number - count) : number] for number, text in enumerate(kept)
            ]
        return texts, behind if count else None

    def _embedded(self, job: EncodeJob) -> tuple[list[list[float]], ...]:
        if not job.embedder:
            return ()
        if self._embedder is None:
            from prophetkv_rag.defaults import MiniLMEmbedder

            if not Path(job.embedder).is_dir():
                msg = (
                    f"the embedding model is not at {job.embedder} here, and nothing is downloaded; copy it there from "
                    "where the caller is"
                )
                raise InputError(msg)
            self._embedder = MiniLMEmbedder(job.embedder)
        return tuple(self._embedder.embed(document) for document in job.documents)

    def _fits(self, text: str) -> bool:
        if not text.strip():
            return False
        engine = self.engine
        return len(engine.tokens.chunk(text.strip())) + len(engine.identity.prefix_ids) <= engine.context_window

    def _is_there(self, key: str) -> bool:
        remote = self.store.remote
        if remote is None:
            return key in self.store
        if remote.records.has(key):
            return True
        try:
            return remote.files.size(self.engine.identity.fingerprint, key) is not None
        except Exception:  # whatever a file system raises
            return False

    def _why_not(self) -> str:
        remote = self.store.remote
        if remote is None:
            return self.store.failures.reason or "the disk limit is reached"
        if remote.writes.is_open or remote.max_bytes is None:
            said = self._told.last
            return f"the remote tier {remote.files.name} does not take them{f' ({said})' if said else ''}"
        return f"the remote tier {remote.files.name} is at its limit of {remote.max_bytes:,} bytes"

    def _place(self) -> str:
        return f"the worker on {socket.gethostname()} (process {os.getpid()})"


def start(worker: ChunkWorker, argument: tuple[WorkerSettings, str]) -> WorkerInfo:
    """See `ChunkWorker.start`."""
    return worker.start(*argument)


def encode(worker: ChunkWorker, job: EncodeJob) -> Encoded:
    """See `ChunkWorker.encode`."""
    return worker.encode(job)


def close(worker: ChunkWorker, nothing: None) -> None:
    """See `ChunkWorker.close`."""
    worker.close(nothing)


def _another_model(engine: ProphetKVEngine, settings: WorkerSettings) -> str:
    return (
        f"its model is not the caller's: caches of {settings.model} in {engine.identity.dtype} on "
        f"{engine.model.device} would be {engine.identity.fingerprint[:12]}, the caller's are "
        f"{settings.fingerprint[:12]}. Give all machines the same files and package versions, and name the dtype "
        "(--dtype bfloat16): auto is float32 on a CPU and the model's own on a GPU"
    )


class _Warnings(logging.Handler):
    """Keeps what is warned of, for the caller; a worker's own log is in Ray's files, which few people look at."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: list[str] = []
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()
        self._messages.append(self.last)

    def take(self) -> tuple[str, ...]:
        messages, self._messages = tuple(dict.fromkeys(self._messages)), []
        return messages
