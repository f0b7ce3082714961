"""The piece that `rope_gather` and `rope_scatter` share: move rows, dequantising and rotating them on the way."""

import triton
import triton.language as tl


@triton.jit
def _as_float(stored, IS_FP8: tl.constexpr):
    """fp32 of what is stored; fp8 e4m3 comes as uint8, as older GPUs have no such type.

    Its bits, shifted into a half's, are the number times 2^-8. That is exact, also for subnormals, and does not depend
    on whether the device flushes fp32 subnormals to 0. The two NaN codes become 480 and -480; caches hold none.
    """
    if IS_FP8:
        code = stored.to(tl.uint16)
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        return stored.to(tl.float32)


@triton.jit
def _load(
    src_ptr, src_rows, valid, channels, STOP: tl.constexpr, scale_ptr, low_ptr, scale_rows,
    SCALE: tl.constexpr, HAS_LOW: tl.constexpr, IS_FP8: tl.constexpr,
):  # [T, C] in fp32: scale * stored + low, of the channels before STOP  # fmt: skip
    in_head = channels < STOP
    mask = valid[:, None] & in_head[None, :]
    number = _as_float(tl.load(src_ptr + src_rows[:, None] + channels[None, :], mask=mask, other=0), IS_FP8)
    if SCALE == "row":
        number = number * tl.load(scale_ptr + scale_rows, mask=valid, other=0.0).to(tl.float32)[:, None]
        if HAS_LOW:
            number = number + tl.load(low_ptr + scale_rows, mask=valid, other=0.0).to(tl.float32)[:, None]
    elif SCALE == "channel":
        number = number * tl.load(scale_ptr + channels, mask=in_head, other=0.0).to(tl.float32)[None, :]
        if HAS_LOW:
            number = number + tl.load(low_ptr + channels, mask=in_head, other=0.0).to(tl.float32)[None, :]
    return number


@triton.jit
def move_rows(
    src_ptr,
    src_rows,  # [T] offset of each row's first element
    dst_ptr,
    dst_rows,  # [T]
    valid,  # [T]
    cos_ptr,
    sin_ptr,
    angle_rows,  # [T] offset of each row's angles
    scale_ptr,
    low_ptr,
    scale_rows,  # [T] offset of each row's scale and low, if SCALE == "row"
    DIM: tl.constexpr,
    HALF: tl.constexpr,  # pairs of channels that are rotated; 0 for none
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_LOW: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """Write `rotate(scale * source + low)` in the destination's type; channels beyond 2 * HALF are not rotated."""
    out_type: tl.constexpr = dst_ptr.dtype.element_ty
    if HALF > 0:
        pairs = tl.arange(0, BLOCK_HALF)
        mask = valid[:, None] & (pairs < HALF)[None, :]
        angles = angle_rows[:, None] + pairs[None, :]
        cos = tl.load(cos_ptr + angles, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angles, mask=mask, other=0.0)
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK_HALF)
            both_mask = valid[:, None] & (both < 2 * HALF)[None, :]
            rows = _load(
                src_ptr, src_rows, valid, both, 2 * HALF, scale_ptr, low_ptr, scale_rows, SCALE, HAS_LOW, IS_FP8
            )
            first, second = tl.split(tl.reshape(rows, (rows.shape[0], BLOCK_HALF, 2)))
            turned = tl.interleave(first * cos - second * sin, second * cos + first * sin)
            tl.store(dst_ptr + dst_rows[:, None] + both[None, :], turned.to(out_type), mask=both_mask)
        else:
            first = _load(src_ptr, src_rows, valid, pairs, HALF, scale_ptr, low_ptr, scale_rows, SCALE, HAS_LOW, IS_FP8)
            second = _load(
                src_ptr, src_rows, valid, HALF + pairs, 2 * HALF, scale_ptr, low_ptr, scale_rows, SCALE, HAS_LOW, IS_FP8
            )
            dst = dst_ptr + dst_rows[:, None] + pairs[None, :]
            tl.store(dst, (first * cos - second * sin).to(out_type), mask=mask)
            tl.store(dst + HALF, (second * cos + first * sin).to(out_type), mask=mask)
    if DIM > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)
        rest_mask = valid[:, None] & (rest < DIM)[None, :]
        kept = _load(src_ptr, src_rows, valid, rest, DIM, scale_ptr, low_ptr, scale_rows, SCALE, HAS_LOW, IS_FP8)
        tl.store(dst_ptr + dst_rows[:, None] + rest[None, :], kept.to(out_type), mask=rest_mask)
