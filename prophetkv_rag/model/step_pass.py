"""The pass of an answer's next tokens: rows that stand behind all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prophetkv_rag.model.attention import AttentionCall
from prophetkv_rag.model.rows_pass import RowsPass


class StepPass(RowsPass):
    """A `RowsPass` whose last row's key is the cache's last: one row alone sees all keys, and needs no mask."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attend over the cache; the heads of a group share their keys as if they were rows."""
        _, num_heads, num_rows, head_dim = call.query.shape
        if num_rows > 1 or call.softcap is not None or call.sinks is not None:
            return super().attend(call)
        window = self.layers[call.layer_idx].sliding_window
        seen = slice(None) if window is None else slice(-window, None)
        groups = call.query.view(1, call.key.shape[1], -1, head_dim)
        attended = F.scaled_dot_product_attention(
            groups, call.key[:, :, seen], call.value[:, :, seen], scale=call.scaling
        )
        return attended.reshape(1, 1, num_heads, -1)
