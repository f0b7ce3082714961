"""`index --ray`: files are split, encoded and embedded by the workers of a Ray cluster; this process alone writes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from prophetkv_rag.cli.console import progress_bar, status
from prophetkv_rag.cli.database import Database
from prophetkv_rag.cli.database_settings import BLOB_DIRECTORY, DatabaseSettings
from prophetkv_rag.cli.indexing import FileToSplit, split_file
from prophetkv_rag.errors import InputError
from prophetkv_rag.extras import needs

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from prophetkv_rag.distributed import ChunkWorker, Cluster, Documents, WorkerPool

_SPLIT_CHARACTERS = 1 << 20
"""Text that a worker splits at a time."""


class IndexCommand(TyperCommand):
    """`index`, whose option `--ray` may stand alone: typer's options either have a value or never."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write out what `--ray` alone means."""
        written: list[str] = []
        for number, word in enumerate(args):
            written.append(word)
            following = args[number + 1] if number + 1 < len(args) else ""
            is_address = following in ("local", "auto") or re.fullmatch(r"[^/]+:[^/]*|[^/]+://.*", following)
            if word == "--ray" and (following.startswith("-") or not is_address):
                written.append("local")
        return super().parse_args(ctx, written)


def check_ray(address: str | None, num_workers: int | None, settings: DatabaseSettings) -> None:
    """Raise `InputError` for what would keep `joined` from working, as far as that can be told at once."""
    if address is None:
        if num_workers is not None:
            msg = "--ray-workers goes with --ray"
            raise InputError(msg)
        return
    from prophetkv_rag.distributed import check_address

    check_address(address)
    with needs("ray", "ray", what="--ray"):
        import ray  # noqa: F401
    if settings.cache_policy != "eager":
        msg = (
            f"--ray computes KV caches now, and the database's cache policy is {settings.cache_policy}; leave --ray "
            "out, or give --cache-policy eager"
        )
        raise InputError(msg)


@dataclass(frozen=True, slots=True)
class JoinedCluster:
    """The cluster that this process is in, and how many workers the user wants of it."""

    cluster: Cluster
    num_workers: int | None


@contextmanager
def joined(
    address: str | None, num_workers: int | None, settings: DatabaseSettings, device: str
) -> Iterator[JoinedCluster | None]:
    """Be in the cluster while the block runs; yields `None` where none is asked for.

    Raises:
        InputError: If it cannot be joined, or has several machines and the database no remote tier.
    """
    if address is None:
        yield None
        return
    from prophetkv_rag.distributed import connect

    with ExitStack() as ends:
        ends.enter_context(redirect_stdout(sys.stderr))  # Ray prints what it thinks of a dead worker among our results
        with status(f"joining Ray ({address})"):
            cluster = ends.enter_context(connect(address))
        if cluster.num_nodes > 1 and not settings.remote:
            msg = (
                f"the Ray cluster has {cluster.num_nodes} machines, and the database no remote tier that all of them "
                "write to; give one with --remote URL (s3://bucket/prefix, or file:///path of a share that all mount)"
            )
            raise InputError(msg)
        cluster.share(num_workers, uses_gpus=device != "cpu")  # before a model is loaded
        yield JoinedCluster(cluster, num_workers)


class RayWorkers:
    """See `indexing.Workers`.

    Args:
        pool: The workers.
        embedder: Directory of the embedding model.
    """

    def __init__(self, pool: WorkerPool, embedder: str) -> None:
        from prophetkv_rag.distributed import Totals

        self._pool = pool
        self._embedder = embedder
        self._totals = Totals()

    def summary(self) -> dict[str, int]:
        """Return what the workers did, for the report."""
        done = {"computed": self._totals.computed, "found": self._totals.found}
        return {"workers": self._pool.num_workers, **done, "deaths": self._pool.deaths}

    def split(self, files: Sequence[FileToSplit]) -> list[list[BaseNode]]:
        """See `indexing.Workers.split`."""
        from llama_index.core.schema import TextNode

        found: list[list[BaseNode]] = [[] for _ in files]
        with progress_bar("splitting files", len(files)) as advance:
            for numbers, nodes in self._pool.run(_split, _Files(files), lambda job: [files[number] for number in job]):
                for number, of_file in zip(numbers, nodes, strict=True):
                    found[number] = [TextNode.from_dict(node) for node in of_file]
                advance(len(numbers))
        return found

    def encode(self, database: Database, nodes: Sequence[Sequence[BaseNode]]) -> Iterator[list[BaseNode]]:
        """See `indexing.Workers.encode`."""
        kept = [[node for node in of_file if node.text.strip()] for of_file in nodes]
        documents = _documents(database, [[node.text for node in of_file] for of_file in kept])
        for numbers, vectors in self._encoded(database, documents, self._embedder):
            done = []
            for number, of_document in zip(numbers, vectors, strict=True):
                for node, vector in zip(kept[number], of_document, strict=True):
                    node.embedding = vector
                done += kept[number]
            yield done

    def complete(self, database: Database) -> None:
        """See `indexing.Workers.complete`: whatever the collection has and lacks a cache for, document by document."""
        from prophetkv_rag.chroma import Record, in_documents

        store = database.store
        store.flush()  # what was deleted is to be gone from the remote tier as well, or workers would find it there
        held = database.collection.get(include=["metadatas", "documents"])
        records = zip(held["ids"], held["documents"], held["metadatas"], strict=True)
        texts = in_documents([Record(*record) for record in records])
        documents = _documents(database, texts)
        there = set() if store.remote is None else set(store.remote.records.known())
        lacking = [
            number
            for number, keys in enumerate(documents.keys)
            if any(key not in store and key not in there for key in keys)
        ]
        if not lacking:
            return
        left = documents.only(lacking)
        with progress_bar("computing KV caches", sum(map(len, left.keys))) as advance:
            for numbers, _ in self._encoded(database, left, ""):
                advance(sum(len(left.keys[number]) for number in numbers))

    def _encoded(self, database: Database, documents: Documents, embedder: str) -> Iterator[tuple[list[int], Any]]:
        from prophetkv_rag.distributed import encode_documents
        from prophetkv_rag.store.disk import writing

        engine, store = database.engine, database.store
        with store.lease([writing(database.collection.owner)]):  # what workers have written has no record yet
            yield from encode_documents(
                self._pool,
                documents,
                self._totals,
                encoding=engine.library.encoding,
                batch_tokens=engine.config.index_batch_tokens,
                traces=lambda key: store.behind(key).traces,
                embedder=embedder,
            )


@contextmanager
def workers_of(joined_cluster: JoinedCluster | None, database: Database, device: str) -> Iterator[RayWorkers | None]:
    """Have workers for a database while the block runs; yields `None` where there is no cluster.

    Raises:
        InputError: If the remote tier cannot be written to, or the cluster has not so many workers.
    """
    if joined_cluster is None:
        yield None
        return
    from prophetkv_rag.defaults import fetch_embedding_model
    from prophetkv_rag.distributed import WorkerPool, WorkerSettings, left_for_workers

    settings, engine, store = database.settings, database.engine, database.store
    fingerprint, files = engine.identity.fingerprint, None if store.remote is None else store.remote.files
    options = WorkerSettings(
        settings.model,
        settings.dtype,
        device,
        engine.config,
        fingerprint,
        database.collection.owner,
        str(database.path.resolve() / BLOB_DIRECTORY) if files is None else None,
        settings.store_options(),
    )
    with (
        left_for_workers(files, store, fingerprint) as name,
        WorkerPool(joined_cluster.cluster, options, name, joined_cluster.num_workers) as pool,
    ):
        yield RayWorkers(pool, str(fetch_embedding_model()))


class _Files:
    """Numbers of the files that are still to be split."""

    def __init__(self, files: Sequence[FileToSplit]) -> None:
        self._files = files
        self._jobs: list[list[int]] = []
        size = 0
        for number, one in enumerate(files):
            if not self._jobs or size + len(one.file.text) > _SPLIT_CHARACTERS:
                self._jobs.append([])
                size = 0
            self._jobs[-1].append(number)
            size += len(one.file.text)
        self._jobs.reverse()

    def take(self) -> list[int] | None:
        return self._jobs.pop() if self._jobs else None

    def give_back(self, job: list[int]) -> None:
        self._jobs.append(job)

    def name(self, job: list[int]) -> str:
        return f"{len(job)} files, the first of which is {self._files[job[0]].file.name}"


def _split(worker: ChunkWorker, files: Sequence[FileToSplit]) -> list[list[dict[str, Any]]]:
    """Run on a worker."""
    return [[node.to_dict() for node in split_file(one, worker.engine.tokenizer)] for one in files]


def _documents(database: Database, texts: Sequence[Sequence[str]]) -> Documents:
    from prophetkv_rag.distributed import Documents

    return Documents.of(texts, database.engine.tokens.chunk, database.engine.identity.key)
