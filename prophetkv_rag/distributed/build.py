"""`build_caches`: from texts to caches in a remote tier, by as many workers as a cluster has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.distributed.cluster import LOCAL, check_address, connect
from prophetkv_rag.distributed.encoding import Documents, Totals, encode_documents
from prophetkv_rag.distributed.meeting import left_for_workers
from prophetkv_rag.distributed.pool import WorkerPool
from prophetkv_rag.distributed.settings import WorkerSettings
from prophetkv_rag.errors import InputError
from prophetkv_rag.text import well_formed


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What `build_caches` came to.

    Attributes:
        chunks: Chunks there are, each text once: all of their caches are in the remote tier.
        computed: How many of them workers computed now, and
        found: how many were there already.
        tokens: Tokens of all texts.
        fingerprint: What the caches are of: engines with this `identity.fingerprint` use them.
        workers: How many worked at a time.
        deaths: How many died meanwhile; others did what they had.
        seconds: How long it took, the start of Ray and the models included.
    """

    chunks: int
    computed: int
    found: int
    tokens: int
    fingerprint: str
    workers: int
    deaths: int
    seconds: float


def build_caches(
    texts: Sequence[str | Sequence[str]],
    model: str | Path,
    *,
    remote: str,
    config: ProphetKVConfig | None = None,
    dtype: str = "auto",
    device: str = "auto",
    address: str = LOCAL,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    remote_max_bytes: int | None = None,
    remote_options: Mapping[str, Any] | None = None,
    blob_format: str = "exact",
    key_file: str | Path | None = None,
) -> BuildReport:
    """Compute the caches of chunks on the workers of a Ray cluster, into a remote tier.

    Engines with the same model, settings and remote tier (`open_store(client, remote=...)`) take them from there when
    they add, or are asked about, the same chunks. What is there already is not computed, so a call that was interrupted
    is made again and goes on.

    Args:
        texts: Documents: the texts of each one's chunks, in order; a string is a document of one chunk.
        model: Directory (the same on every machine) or hub name (which every machine has in its cache).
        remote: URL of the tier that all machines reach, as `open_store` takes it.
        config: The settings of the engines that will use the caches.
        dtype: What the model computes in: auto, float32, bfloat16 or float16.
        device: `"auto"` is a GPU for each worker, if the cluster has GPUs.
        address: `"local"` starts Ray on this machine, `"auto"` uses the one that runs here, else HOST:PORT of a
            cluster. A process that has called `ray.init` already uses that.
        num_workers: How many models there are; by default one a GPU, or without GPUs one a machine.
        progress: Called with (chunks done so far, chunks in all).
        remote_max_bytes: Most bytes of blobs there; see `TieredStore`.
        remote_options: Arguments of the fsspec file system.
        blob_format: How blobs are written.
        key_file: File with the key that blobs are encrypted with; at the same path on every machine.

    Raises:
        InputError: If something that was given cannot be used, here or on a worker.
        StoreError: If the remote tier does not take all; what was computed so far is there.
        WorkerError: If workers die again and again.
    """
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.model import device_of, dtype_of, load_model
    from prophetkv_rag.store.disk import open_disk_store
    from prophetkv_rag.store.encryption import load_key

    started = time.perf_counter()
    check_address(address)
    key = None if key_file is None else str(Path(key_file).absolute())
    load_key(key)
    options: dict[str, Any] = {
        "remote": remote,
        "remote_max_bytes": remote_max_bytes,
        "remote_options": dict(remote_options or {}),
    }
    options |= {"blob_format": blob_format, "encryption_key": key}
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        store = open_disk_store(scratch, ram_bytes=0, max_bytes=0, **options)
        try:
            loaded, tokenizer = load_model(str(model), dtype=dtype_of(dtype), device=device_of(device))
            engine = ProphetKVEngine(loaded, tokenizer, config=config, store=store)
            identity, tokens, encoding = engine.identity, engine.tokens, engine.library.encoding
            batch_tokens, config = engine.config.index_batch_tokens, engine.config
            longest = engine.context_window - len(identity.prefix_ids)
            del engine, loaded  # the workers have their own
            split = [(one,) if isinstance(one, str) else tuple(one) for one in texts]
            _check_chunks(split, tokens.chunk, longest)
            documents = Documents.of(split, tokens.chunk, identity.key)
            settings = WorkerSettings(str(model), dtype, device, config, identity.fingerprint, "build", None, options)
            remote_files = store.remote.files if store.remote is not None else None
            totals, chunks = Totals(), len({key for keys in documents.keys for key in keys})
            with (
                connect(address) as cluster,
                left_for_workers(remote_files, store, identity.fingerprint) as name,
                WorkerPool(cluster, settings, name, num_workers) as pool,
            ):
                encoding_all = encode_documents(pool, documents, totals, encoding=encoding, batch_tokens=batch_tokens)
                for _ in encoding_all:
                    if progress is not None:
                        progress(totals.computed + totals.found, chunks)
        finally:
            store.close()
    return BuildReport(
        chunks,
        totals.computed,
        chunks - totals.computed,
        sum(documents.lengths),
        identity.fingerprint,
        pool.num_workers,
        pool.deaths,
        time.perf_counter() - started,
    )


def _check_chunks(documents: Sequence[Sequence[str]], tokens_of: Callable[[str], Sequence[int]], longest: int) -> None:
    for number, document in enumerate(documents):
        for place, text in enumerate(document):
            length = len(tokens_of(well_formed(text).strip())) if text.strip() else 0
            if not 0 < length <= longest:
                why = "is blank" if not length else f"has {length} tokens, and the context window leaves {longest}"
                msg = f"chunk {place} of document {number} {why}; leave it out, or split it"
                raise InputError(msg)
