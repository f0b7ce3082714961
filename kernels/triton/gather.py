"""Triton: chunk caches into one cache, in one pass: gather, dequantise, rotate keys, copy values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from prophetkv_rag.kernels.arguments import Angles, States
from prophetkv_rag.kernels.row_source import RowSource, format_of, is_fp8
from prophetkv_rag.kernels.triton.launch import row_arguments
from prophetkv_rag.kernels.triton.row_moves import move_rows
from prophetkv_rag.kernels.triton.tiles import ROW_TILE

ALIGNMENT = 16  # bytes of the widest load


@triton.jit
def _move_part(
    PART: tl.constexpr,  # 0 for keys, 1 for values
    source, src_row, head,  # the chunk's addresses, and the tile's first row of all heads' rows
    dst_ptr, dst_stride,
    cos_ptr, sin_ptr,
    valid,
    TYPE: tl.constexpr, SCALE: tl.constexpr, SCALE_TYPE: tl.constexpr, HAS_LOW: tl.constexpr, IS_FP8: tl.constexpr,
    IS_ALIGNED: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    in_tile = tl.arange(0, TILE)
    stored = tl.load(source + PART).to(tl.pointer_type(TYPE))
    if IS_ALIGNED:
        stored = tl.multiple_of(stored, 16)
    scale_row = src_row if SCALE == "row" else head * DIM
    scales = tl.load(source + 2 + PART).to(tl.pointer_type(SCALE_TYPE))
    lows = tl.load(source + 4 + PART).to(tl.pointer_type(SCALE_TYPE))
    move_rows(
        stored + src_row * DIM, in_tile * DIM, dst_ptr, in_tile * dst_stride, valid,
        cos_ptr, sin_ptr, in_tile * HALF, scales + scale_row, lows + scale_row, in_tile,
        DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, SCALE, HAS_LOW, IS_FP8,
    )  # fmt: skip


@triton.jit
def gather_kernel(
    source_ptr,  # [chunks, 7] int64: addresses of keys, values, their scales, their lows; tokens
    tile_ptr,  # [tiles, 5] int64: chunk, first token in it, tokens, first row of the cache, first row of the angles
    key_ptr,  # [Hkv, n, D]
    value_ptr,  # [Hkv, n, Dv]
    cos_ptr,  # [tokens of all chunks, HALF] fp32
    sin_ptr,
    key_stride_head, key_stride_row,
    value_stride_head, value_stride_row,
    KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr, KEY_SCALE: tl.constexpr, VALUE_SCALE: tl.constexpr,
    KEY_SCALE_TYPE: tl.constexpr, VALUE_SCALE_TYPE: tl.constexpr,
    HAS_KEY_LOW: tl.constexpr, HAS_VALUE_LOW: tl.constexpr, IS_KEY_FP8: tl.constexpr, IS_VALUE_FP8: tl.constexpr,
    IS_ALIGNED: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    INTERLEAVED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (tile of one chunk's tokens, key/value head, 0 for keys and 1 for values)."""
    tile = tile_ptr + tl.program_id(0) * 5
    head = tl.program_id(1).to(tl.int64)
    chunk, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row, angle = tl.load(tile + 3), tl.load(tile + 4)
    source = source_ptr + chunk * 7
    tokens = tl.load(source + 6)
    valid = tl.arange(0, TILE) < count
    src_row = head * tokens + first
    if tl.program_id(2) == 0:
        _move_part(
            0, source, src_row, head, key_ptr + head * key_stride_head + row * key_stride_row, key_stride_row,
            cos_ptr + angle * HALF, sin_ptr + angle * HALF, valid,
            KEY_TYPE, KEY_SCALE, KEY_SCALE_TYPE, HAS_KEY_LOW, IS_KEY_FP8,
            IS_ALIGNED, DIM, HALF, BLOCK_HALF, BLOCK_REST, INTERLEAVED, TILE,
        )  # fmt: skip
    else:
        _move_part(
            1, source, src_row, head, value_ptr + head * value_stride_head + row * value_stride_row, value_stride_row,
            cos_ptr, sin_ptr, valid,
            VALUE_TYPE, VALUE_SCALE, VALUE_SCALE_TYPE, HAS_VALUE_LOW, IS_VALUE_FP8,
            IS_ALIGNED, VALUE_DIM, 0, 1, BLOCK_VALUE, False, TILE,
        )  # fmt: skip


_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def rope_gather(out: States, sources: Sequence[RowSource], starts: Sequence[int], angles: Angles | None) -> None:
    """In one launch for all chunks of one stored format."""
    angle_rows, total = [], 0
    for source in sources:
        angle_rows.append(total)
        total += source.num_tokens
    groups: dict[object, list[tuple[RowSource, int, int]]] = {}
    for source, start, angle_row in zip(sources, starts, angle_rows, strict=True):
        plain = source.as_plain()
        if plain.num_tokens:
            groups.setdefault(format_of(plain), []).append((plain, start, angle_row))
    for chunks in groups.values():
        _launch(out, chunks, angles)


def _launch(out: States, chunks: Sequence[tuple[RowSource, int, int]], angles: Angles | None) -> None:
    """Gather chunks of one format, each with its first row of the cache and its first row of the angles."""
    device, (first, *_) = out.key.device, chunks[0]
    table = [
        [*(0 if tensor is None else tensor.data_ptr() for tensor in source), source.num_tokens]
        for source, _, _ in chunks
    ]
    places = tuple((source.num_tokens, start, angle_row) for source, start, angle_row in chunks)
    tiles = _tile_table(places, device)
    is_aligned = not any(address % ALIGNMENT for row in table for address in row[:2])
    gather_kernel[(tiles.shape[0], out.key.shape[0], 2)](
        _sent(table, device),
        tiles,
        out.key,
        out.value,
        key_stride_head=out.key.stride(0),
        key_stride_row=out.key.stride(1),
        value_stride_head=out.value.stride(0),
        value_stride_row=out.value.stride(1),
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
        **row_arguments(out.key.shape[2], out.value.shape[2], angles, out.key),
    )


@lru_cache(maxsize=4)
def _tile_table(places: tuple[tuple[int, int, int], ...], device: torch.device) -> torch.Tensor:
    """`[tiles, 5]`, see the kernel; the layers of a prompt share it, so it is sent to the device once."""
    tiles = [
        [index, token, min(ROW_TILE, length - token), start + token, angle_row + token]
        for index, (length, start, angle_row) in enumerate(places)
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
