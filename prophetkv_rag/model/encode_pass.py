"""The forward pass of index time: chunks encoded side by side, their keys un-rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from prophetkv_rag.kernels import ops
from prophetkv_rag.model.attention import AttentionCall, AttentionPass
from prophetkv_rag.model.rope import RopeTables
from prophetkv_rag.model.support import LayerSupport


class EncodePass(AttentionPass):
    """Encodes sequences behind an optional prefix, capturing keys **un-rotated**.

    The model runs with every position id at 0, so the keys and queries that reach us are un-rotated; they are rotated
    here, from float64 tables, for the attention only. That gives un-rotated keys without touching the model's code and
    without rounding them twice.
    """

    def __init__(
        self,
        layers: Sequence[LayerSupport],
        *,
        seq_len: int,
        prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        device: torch.device,
    ) -> None:
        """Prepare the pass.

        Args:
            layers: The probe's findings.
            seq_len: Tokens per sequence (padding on the right does no harm: attention is causal).
            prefix: Rotated keys and values `[Hkv, prefix_len, D]` per layer of what comes before, or `None`.
            device: Where the tables live.
        """
        self.layers = layers
        self.prefix = prefix
        prefix_len = 0 if prefix is None else prefix[0][0].shape[-2]
        self.positions = torch.arange(prefix_len, prefix_len + seq_len, device=device)
        self.tables = RopeTables(self.positions)
        self._masks: dict[int | None, torch.Tensor] = {}

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return the additive mask of a window, in the queries' dtype, which SDPA would else make in every layer."""
        if window not in self._masks:
            rows = self.positions[:, None]
            keys = torch.arange(int(self.positions[-1]) + 1, device=rows.device)[None, :]
            visible = keys <= rows
            if window is not None:
                visible &= keys > rows - window
            mask = torch.zeros(visible.shape, dtype=dtype, device=rows.device)
            self._masks[window] = mask.masked_fill_(~visible, float("-inf"))
        return self._masks[window]

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Rotate, put the prefix in front, attend causally."""
        layer = self.layers[call.layer_idx]
        query = self.tables.rotate(call.query, layer.rotation)
        key = self.tables.rotate(call.key, layer.rotation)
        value = call.value
        if self.prefix is not None:
            prefix_key, prefix_value = self.prefix[call.layer_idx]
            batch = key.shape[0]
            key = torch.cat([prefix_key.expand(batch, -1, -1, -1), key], dim=2)
            value = torch.cat([prefix_value.expand(batch, -1, -1, -1), value], dim=2)
        if call.softcap is None and call.sinks is None:
            if self.prefix is None and layer.sliding_window is None:
                output = F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=call.scaling, enable_gqa=True
                )
            else:
                mask = self._mask(layer.sliding_window, query.dtype)
                output = F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, scale=call.scaling, enable_gqa=True
                )
            return output.transpose(1, 2).contiguous()
        blocks = ops.RowBlocks(
            self.positions, num_groups=query.shape[1] // key.shape[1], sliding_window=layer.sliding_window
        )
        outputs = [
            ops.selected_rows_attention(
                query[i], key[i], value[i], blocks, scaling=call.scaling, softcap=call.softcap, sinks=call.sinks
            )
            for i in range(query.shape[0])
        ]
        return torch.stack(outputs)


class EncodeBehindPass(AttentionPass):
    """As `EncodePass`, where each sequence of the batch has a prefix of its own, of any length.

    Attention is computed sequence by sequence, so nothing is padded in front of them; all else is computed together.
    """

    def __init__(
        self,
        layers: Sequence[LayerSupport],
        *,
        seq_len: int,
        prefixes: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]] | None],
        device: torch.device,
    ) -> None:
        """Prepare the pass; `prefixes` has one entry a sequence, each as `EncodePass` takes it."""
        self.rows = [EncodePass(layers, seq_len=seq_len, prefix=prefix, device=device) for prefix in prefixes]

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Let every sequence attend to its own prefix and itself."""
        return torch.cat(
            [
                row.attend(
                    replace(call, query=call.query[i : i + 1], key=call.key[i : i + 1], value=call.value[i : i + 1])
                )
                for i, row in enumerate(self.rows)
            ]
        )
