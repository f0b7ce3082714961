"""Triton: chunk caches into one cache, in one pass: gather, dequantise, rotate keys, copy values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from prophetkv_rag.kernels.row_moves import move_rows
from prophetkv_rag.kernels.row_source import RowSource, format_of, is_fp8
from prophetkv_rag.kernels.tiles import ROW_TILE, padded, row_warps

ALIGNMENT = 16  # bytes of the widest load


@triton.jit
def rope_gather_kernel(
    source_ptr,  # [chunks, 7] int64: addresses of keys, values, their scales, their lows; tokens
    tile_ptr,  # [tiles, 5] int64: chunk, first token in it, tokens, first row of the cache, first row of the angles
    key_ptr,  # [Hkv, n, D]
    value_ptr,  # [Hkv, n, Dv]
    cos_ptr,  # [tokens of all chunks, HALF] fp32
    sin_ptr,
    key_stride_head,
    key_stride_row,
    value_stride_head,
    value_stride_row,
    KEY_TYPE: tl.constexpr,
    VALUE_TYPE: tl.constexpr,
    KEY_SCALE: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    KEY_SCALE_TYPE: tl.constexpr,
    VALUE_SCALE_TYPE: tl.constexpr,
    HAS_KEY_LOW: tl.constexpr,
    HAS_VALUE_LOW: tl.constexpr,
    IS_KEY_FP8: tl.constexpr,
    IS_VALUE_FP8: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (tile of one chunk's tokens, key/value head, 0 for keys and 1 for values)."""
    tile = tile_ptr + tl.program_id(0) * 5
    head = tl.program_id(1).to(tl.int64)
    chunk, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row, angle = tl.load(tile + 3), tl.load(tile + 4)
    source = source_ptr + chunk * 7
    tokens = tl.load(source + 6)
    in_tile = tl.arange(0, TILE)
    valid = in_tile < count
    src_row = head * tokens + first
    if tl.program_id(2) == 0:
        keys = tl.load(source).to(tl.pointer_type(KEY_TYPE))
        if IS_ALIGNED:
            keys = tl.multiple_of(keys, 16)
        scale_row = src_row if KEY_SCALE == "row" else head * KEY_DIM
        scales = tl.load(source + 2).to(tl.pointer_type(KEY_SCALE_TYPE))
        lows = tl.load(source + 4).to(tl.pointer_type(KEY_SCALE_TYPE))
        move_rows(
            keys + src_row * KEY_DIM,
            in_tile * KEY_DIM,
            key_ptr + head * key_stride_head + row * key_stride_row,
            in_tile * key_stride_row,
            valid,
            cos_ptr + angle * HALF,
            sin_ptr + angle * HALF,
            in_tile * HALF,
            scales + scale_row,
            lows + scale_row,
            in_tile,
            KEY_DIM,
            HALF,
            BLOCK_HALF,
            BLOCK_REST,
            INTERLEAVED,
            KEY_SCALE,
            HAS_KEY_LOW,
            IS_KEY_FP8,
        )
    else:
        values = tl.load(source + 1).to(tl.pointer_type(VALUE_TYPE))
        if IS_ALIGNED:
            values = tl.multiple_of(values, 16)
        scale_row = src_row if VALUE_SCALE == "row" else head * VALUE_DIM
        scales = tl.load(source + 3).to(tl.pointer_type(VALUE_SCALE_TYPE))
        lows = tl.load(source + 5).to(tl.pointer_type(VALUE_SCALE_TYPE))
        move_rows(
            values + src_row * VALUE_DIM,
            in_tile * VALUE_DIM,
            value_ptr + head * value_stride_head + row * value_stride_row,
            in_tile * value_stride_row,
            valid,
            cos_ptr,
            sin_ptr,
            in_tile,
            scales + scale_row,
            lows + scale_row,
            in_tile,
            VALUE_DIM,
            0,
            1,
            BLOCK_VALUE,
            False,
            VALUE_SCALE,
            HAS_VALUE_LOW,
            IS_VALUE_FP8,
        )


_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def rope_gather(
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    sources: Sequence[RowSource],
    starts: Sequence[int],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    interleaved: bool = False,
) -> None:
    """As `reference.rope_gather`; one launch for all chunks of one stored format."""
    angle_rows, total = [], 0
    for source in sources:
        angle_rows.append(total)
        total += source.num_tokens
    groups: dict[object, list[int]] = {}
    plain = [source.as_plain() for source in sources]
    for index, source in enumerate(plain):
        if source.num_tokens:
            groups.setdefault(format_of(source), []).append(index)
    for members in groups.values():
        _launch(
            key_out,
            value_out,
            [plain[index] for index in members],
            [starts[index] for index in members],
            [angle_rows[index] for index in members],
            cos,
            sin,
            interleaved,
        )


def _launch(
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    sources: Sequence[RowSource],
    starts: Sequence[int],
    angle_rows: Sequence[int],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> None:
    device, first = key_out.device, sources[0]
    heads, dim, value_dim = key_out.shape[0], key_out.shape[2], value_out.shape[2]
    half = 0 if cos is None else cos.shape[-1]
    pointers = [[0 if tensor is None else tensor.data_ptr() for tensor in source] for source in sources]
    lengths = tuple(source.num_tokens for source in sources)
    tiles = _tile_table(lengths, tuple(starts), tuple(angle_rows), device)
    table = [[*addresses, tokens] for addresses, tokens in zip(pointers, lengths, strict=True)]
    is_aligned = not any(address % ALIGNMENT for row in table for address in row[:2])
    rope_gather_kernel[(tiles.shape[0], heads, 2)](
        _sent(table, device),
        tiles,
        key_out,
        value_out,
        key_out if cos is None else cos.contiguous(),
        key_out if sin is None else sin.contiguous(),
        key_out.stride(0),
        key_out.stride(1),
        value_out.stride(0),
        value_out.stride(1),
        KEY_TYPE=_TYPES[first.keys.dtype],
        VALUE_TYPE=_TYPES[first.values.dtype],
        KEY_SCALE=_scale_mode(first.key_scale),
        VALUE_SCALE=_scale_mode(first.value_scale),
        KEY_SCALE_TYPE=_scale_type(first.key_scale),
        VALUE_SCALE_TYPE=_scale_type(first.value_scale),
        HAS_KEY_LOW=first.key_low is not None,
        HAS_VALUE_LOW=first.value_low is not None,
        IS_KEY_FP8=is_fp8(first.keys, first.key_low),
        IS_VALUE_FP8=is_fp8(first.values, first.value_low),
        IS_ALIGNED=is_aligned,
        KEY_DIM=dim,
        VALUE_DIM=value_dim,
        HALF=half,
        BLOCK_HALF=padded(half),
        BLOCK_REST=padded(dim - 2 * half),
        BLOCK_VALUE=padded(value_dim),
        INTERLEAVED=interleaved,
        TILE=ROW_TILE,
        num_warps=row_warps(max(dim, value_dim)),
    )


@lru_cache(maxsize=4)
def _tile_table(
    lengths: tuple[int, ...], starts: tuple[int, ...], angle_rows: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """`[tiles, 5]`, see the kernel; the layers of a prompt share it, so it is sent to the device once."""
    tiles = [
        [index, token, min(ROW_TILE, length - token), start + token, angle_row + token]
        for index, (length, start, angle_row) in enumerate(zip(lengths, starts, angle_rows, strict=True))
        for token in range(0, length, ROW_TILE)
    ]
    return _sent(tiles, device)


def _sent(table: list[list[int]], device: torch.device) -> torch.Tensor:
    """`table` as int64 on the device. From pinned memory: the copy is queued, and the host does not wait for it."""
    return torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _scale_mode(scale: torch.Tensor | None) -> str:
    """`[Hkv, T, 1]` is a scale per row, `[Hkv, 1, D]` one per channel (one token's too: it has D of them)."""
    if scale is None:
        return "none"
    return "row" if scale.shape[-1] == 1 else "channel"


def _scale_type(scale: torch.Tensor | None) -> tl.dtype:
    return tl.float32 if scale is None else _TYPES[scale.dtype]
