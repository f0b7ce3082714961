"""What `rope_gather` takes: one chunk's keys and values of one layer, plain or quantised."""

from __future__ import annotations

from typing import NamedTuple

import torch

KERNEL_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
)


class RowSource(NamedTuple):
    """Keys and values of one chunk in one layer.

    `keys` is `[Hkv, T, D]`, un-rotated, `values` `[Hkv, T, Dv]`, both of one kind: fp32, fp16, bf16, int8 or fp8 (e4m3,
    as `torch.float8_e4m3fn` or its bits in `torch.uint8`). A scale is `[Hkv, T, 1]` (per row) or `[Hkv, 1, D]` (per
    channel), fp32 or fp16; the number meant is the stored one times its scale. `None` stands for 1.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return int(self.keys.shape[1])

    @property
    def unknown_dtype(self) -> torch.dtype | None:
        """The dtype that the gather kernel cannot read; `None` if there is none."""
        return next((rows.dtype for rows in self[:2] if rows.dtype not in KERNEL_DTYPES), None)

    def to(self, device: torch.device) -> RowSource:
        """Bring all four to a device."""
        return RowSource(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self))  # type: ignore[arg-type]

    def as_plain(self) -> RowSource:
        """Contiguous tensors, fp8 as bits, scales in fp32."""
        keys, values = (
            (rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows).contiguous() for rows in self[:2]
        )
        scales = (None if scale is None else scale.float().contiguous() for scale in self[2:])
        return RowSource(keys, values, *scales)


def format_of(source: RowSource) -> tuple[object, ...]:
    """What chunks must have in common to be gathered by one launch."""
    modes = (None if scale is None else scale.shape[-1] == 1 for scale in (source.key_scale, source.value_scale))
    return (source.keys.dtype, source.values.dtype, *modes)
