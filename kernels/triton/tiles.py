"""Tile sizes of the Triton kernels, by device: as data, so that the compile tests check exactly what is shipped.

No timing stands behind them (no GPU was at hand): they are the largest tiles that compile without register spills and
fit the device's shared memory.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

MAX_HEAD_DIM = 256
ROW_TILE = 32
"""Rows per program of the gather and scatter kernels."""
SCORE_BLOCK_KEYS = 128
PROMPT_SIZES = ("num_rows", "num_keys")
"""Arguments that Triton must not compile in: it would make kernels of their own for 1 and for multiples of 16, and the
first prompt of such a length would wait seconds for the compiler."""
TARGETS = ("sm_80", "sm_90", "gfx942")


class Tile(NamedTuple):
    """Packed query rows and keys per step, and how a program is run."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


# By (target, bytes of a number, head dim padded to a power of 2, at least 64).
ATTENTION: dict[tuple[str, int, int], Tile] = {
    ("sm_90", 2, 64): Tile(128, 64, 4, 3),
    ("sm_90", 2, 128): Tile(128, 64, 8, 3),
    ("sm_90", 2, 256): Tile(64, 32, 8, 2),
    ("sm_80", 2, 64): Tile(128, 64, 8, 2),
    ("sm_80", 2, 128): Tile(64, 64, 8, 2),
    ("sm_80", 2, 256): Tile(64, 32, 8, 2),
    ("gfx942", 2, 64): Tile(128, 64, 4, 2),
    ("gfx942", 2, 128): Tile(64, 32, 4, 2),
    ("gfx942", 2, 256): Tile(32, 32, 4, 2),
    ("sm_90", 4, 64): Tile(64, 32, 8, 2),
    ("sm_90", 4, 128): Tile(16, 32, 8, 2),
    ("sm_90", 4, 256): Tile(32, 32, 16, 1),
    ("sm_80", 4, 64): Tile(64, 32, 8, 2),
    ("sm_80", 4, 128): Tile(32, 32, 8, 2),
    ("sm_80", 4, 256): Tile(16, 32, 8, 1),
    ("gfx942", 4, 64): Tile(32, 32, 4, 1),
    ("gfx942", 4, 128): Tile(32, 32, 4, 1),
    ("gfx942", 4, 256): Tile(16, 16, 4, 1),
}
SCORES: dict[tuple[str, int, int], Tile] = {
    (target, size, dim): tile
    for target in TARGETS
    for size, dim, tile in (
        (2, 64, Tile(64, SCORE_BLOCK_KEYS, 4, 3)),
        (2, 128, Tile(64, SCORE_BLOCK_KEYS, 4, 3)),
        (2, 256, Tile(32, 64, 4, 2)),
        (4, 64, Tile(32, 32, 4, 2)),
        (4, 128, Tile(32, 32, 8, 2)),
        (4, 256, Tile(16, 32, 4, 1)),
    )
}
LOG_SUM_EXP: dict[tuple[str, int, int], Tile] = {
    (target, size, dim): tile
    for target in TARGETS
    for size, dim, tile in (
        (2, 64, Tile(64, 64, 4, 3)),
        (2, 128, Tile(64, 64, 4, 2)),
        (2, 256, Tile(32, 64, 4, 2)),
        (4, 64, Tile(32, 32, 4, 2)),
        (4, 128, Tile(32, 32, 4, 2)),
        (4, 256, Tile(16, 32, 4, 1)),
    )
}
INTERPRETED = Tile(64, 64, 4, 1)
"""For tensors on a CPU: Triton's interpreter, which the tests use."""


def padded(size: int) -> int:
    """The next power of 2, at least 1: Triton's blocks have such sizes."""
    return 1 if size <= 1 else 1 << (size - 1).bit_length()


def row_warps(dim: int) -> int:
    """Warps of a program of the gather and scatter kernels; wide heads spilled with 4."""
    return 8 if dim > 128 else 4


def padded_head(size: int) -> int:
    """A head dim as matrix instructions take it: a power of 2, at least 16."""
    return max(16, padded(size))


@cache
def target_of(device: torch.device) -> str | None:
    """The entry of the tables that fits a device; `None` if none does (older than Ampere)."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    if major < 8:
        return None
    # Compute capability 12 (consumer cards) has no more shared memory than 8.6; 9 and 10 (data centre) have more.
    return "sm_90" if major in (9, 10) else "sm_80"


def tile_for(table: dict[tuple[str, int, int], Tile], tensor: torch.Tensor, head_dim: int) -> Tile:
    """The tile for a tensor's device and dtype."""
    if tensor.device.type != "cuda":
        return INTERPRETED
    target = target_of(tensor.device)
    assert target is not None, "ops asks first"
    return table[target, tensor.element_size(), max(64, padded(head_dim))]


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def num_splits(num_programs: int, num_key_blocks: int, device: torch.device) -> int:
    """Into how many ranges of keys to cut the work of few rows, so that every processor gets some."""
    wanted = -(-2 * num_processors(device) // num_programs)
    return max(1, min(wanted, num_key_blocks // 4))
