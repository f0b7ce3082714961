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
SCALE_DTYPES = (torch.float32, torch.float16)


class RowSource(NamedTuple):
    """Keys and values of one chunk in one layer.

    `keys` is `[Hkv, T, D]`, un-rotated, `values` `[Hkv, T, Dv]`: fp32, fp16, bf16, int8, fp8 (e4m3, as
    `torch.float8_e4m3fn` or its bits in `torch.uint8`) or, where there is a low, `torch.uint8`. A scale is
    `[Hkv, T, 1]` (per row) or `[Hkv, 1, D]` (per channel), fp32 or fp16, and so is the low that goes with it; the
    number meant is the stored one times its scale plus its low. `None` stands for 1 and for 0; a low needs a scale.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    key_low: torch.Tensor | None = None
    value_low: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return int(self.keys.shape[1])

    @property
    def unknown_dtype(self) -> torch.dtype | None:
        """The dtype that the gather kernel cannot read; `None` if there is none."""
        return next((rows.dtype for rows in self[:2] if rows.dtype not in KERNEL_DTYPES), None)

    def to(self, device: torch.device) -> RowSource:
        """Bring all of it to a device."""
        return RowSource(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self))  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise `ValueError` if a low has no scale, is shaped unlike it, or belongs to fp8 numbers."""
        for name, rows, scale, low in (
            ("key", self.keys, self.key_scale, self.key_low),
            ("value", self.values, self.value_scale, self.value_low),
        ):
            if low is not None and (scale is None or scale.shape != low.shape or is_fp8(rows, low)):
                beside = "no scale" if scale is None else f"a scale of {list(scale.shape)}"
                msg = (
                    f"{name}_low is {list(low.shape)} beside {beside} and {rows.dtype}; "
                    "it needs integers and a scale of its shape"
                )
                raise ValueError(msg)

    def as_plain(self) -> RowSource:
        """Contiguous tensors, fp8 as bits; a part's scale and low of one dtype; checked."""
        self.check()
        keys, key_scale, key_low = _plain(self.keys, self.key_scale, self.key_low)
        values, value_scale, value_low = _plain(self.values, self.value_scale, self.value_low)
        return RowSource(keys, values, key_scale, value_scale, key_low, value_low)


def is_fp8(rows: torch.Tensor, low: torch.Tensor | None) -> bool:
    """Whether stored numbers are fp8, or bits of fp8."""
    return rows.dtype == torch.float8_e4m3fn or (rows.dtype == torch.uint8 and low is None)


def _plain(
    rows: torch.Tensor, scale: torch.Tensor | None, low: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    if rows.dtype == torch.float8_e4m3fn:
        rows = rows.view(torch.uint8)
    if scale is None:
        return rows.contiguous(), None, None
    if scale.dtype not in SCALE_DTYPES or (low is not None and low.dtype != scale.dtype):
        scale, low = scale.float(), None if low is None else low.float()
    return rows.contiguous(), scale.contiguous(), None if low is None else low.contiguous()


def format_of(source: RowSource) -> tuple[object, ...]:
    """What chunks must have in common to be gathered by one launch."""
    scales = (source.key_scale, source.value_scale)
    how = [None if scale is None else (scale.shape[-1] == 1, scale.dtype) for scale in scales]
    return (source.keys.dtype, source.values.dtype, *how, source.key_low is None, source.value_low is None)
