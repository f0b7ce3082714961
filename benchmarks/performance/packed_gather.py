"""Prints what int8 caches cost on a CPU, unpacked when they are loaded or when they are gathered.

    OMP_NUM_THREADS=1 python benchmarks/performance/packed_gather.py

2,048 tokens of random K/V in chunks of 256, in SmolLM2-135M's shape. Processor time of one thread, medians,
alternating.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch

from prophetkv_rag.model import RopeTables, Rotation
from prophetkv_rag.store import ChunkCache
from prophetkv_rag.store.blobs import decode_blob, encode_blob

LAYERS, KV_HEADS, HEAD_DIM, CHUNKS, CHUNK_TOKENS, ROUNDS = 30, 3, 64, 8, 256, 8
KEY, FINGERPRINT = "0" * 64, "f"
STARTS = [number * CHUNK_TOKENS for number in range(CHUNKS)]
ROTATION = Rotation(tuple(10000.0 ** (-channel / 32) for channel in range(HEAD_DIM // 2)), False)


def random_blob(dtype: torch.dtype) -> bytes:
    """Return a chunk's int8 blob."""
    keys, values = (
        tuple(torch.randn(KV_HEADS, CHUNK_TOKENS, HEAD_DIM).to(dtype) for _ in range(LAYERS)) for _ in range(2)
    )
    cache = ChunkCache(torch.arange(CHUNK_TOKENS, dtype=torch.int32), keys, values)
    return encode_blob(cache, key=KEY, fingerprint=FINGERPRINT, blob_format="int8")


def load(blobs: list[bytes], packed: bool) -> list[ChunkCache]:
    """Return the blobs' caches."""
    return [decode_blob(bytearray(blob), key=KEY, fingerprint=FINGERPRINT, packed=packed) for blob in blobs]


def gather(caches: list[ChunkCache], dtype: torch.dtype) -> None:
    """Rotate keys and copy values into one cache, layer by layer, as the engine does."""
    tables = RopeTables(torch.arange(CHUNKS * CHUNK_TOKENS))
    for layer in range(LAYERS):
        keys, values = (torch.empty(KV_HEADS, CHUNKS * CHUNK_TOKENS, HEAD_DIM, dtype=dtype) for _ in range(2))
        tables.gather(keys, values, [cache.source(layer) for cache in caches], STARTS, ROTATION)


def milliseconds(work: Callable[[], object]) -> float:
    """Return the processor time that it takes."""
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started)


def main() -> None:
    """Print a line per dtype and way."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        blobs = [random_blob(dtype) for _ in range(CHUNKS)]
        held = {packed: load(blobs, packed) for packed in (False, True)}
        times = defaultdict(list)
        for _ in range(ROUNDS + 1):
            for packed, caches in held.items():
                times[packed, "load"].append(milliseconds(partial(load, blobs, packed)))
                times[packed, "gather"].append(milliseconds(partial(gather, caches, dtype)))
        for packed, caches in held.items():
            loading, gathering = (statistics.median(times[packed, what][1:]) for what in ("load", "gather"))
            way = "packed  " if packed else "unpacked"
            held_mb = sum(cache.nbytes for cache in caches) / 1e6
            sys.stdout.write(f"{dtype} {way} {held_mb:5.1f} MB  load {loading:5.1f} ms  gather {gathering:5.1f} ms\n")


if __name__ == "__main__":
    main()
