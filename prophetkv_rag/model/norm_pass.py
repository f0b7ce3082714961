"""A forward pass that scores keys by the norm, over the asking rows, of the attention they receive."""

from __future__ import annotations

from dataclasses import replace

import torch

from prophetkv_rag.kernels import ops
from prophetkv_rag.model.attention import AttentionCall
from prophetkv_rag.model.rows_pass import RowsPass, ScoringPass


class NormScoringPass(ScoringPass):
    """A `ScoringPass` with the L2 norm over asking rows in place of their mean: few rows that look hard outweigh many.

    In each layer that counts, a key's weights of one row are averaged over the heads (softmax over all that the row
    sees), and the norm over the rows is taken; the layers' norms are summed. Rows go one by one, so that nothing of the
    size heads x rows x keys is ever made; that is meant for few layers.
    """

    @property
    def scores(self) -> torch.Tensor:
        """`[n]` in fp32."""
        total = torch.zeros(self.context.shape, dtype=torch.float32, device=self.context.device)
        for mass in self._mass.values():
            total += mass[0]
        return total

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attend, adding this layer's norms to those of the layers before it."""
        if call.layer_idx not in self.counted:
            return RowsPass.attend(self, call)
        heads, num_keys, device = call.query.shape[1], call.key.shape[2], call.key.device
        lse = torch.empty(heads, call.query.shape[2], dtype=torch.float32, device=device)
        blocks = self.blocks(call)
        output = ops.selected_rows_attention(
            call.query[0], call.key[0], call.value[0], blocks,
            scaling=call.scaling, softcap=call.softcap, sinks=call.sinks, lse=lse,
        )  # fmt: skip
        squares = torch.zeros(num_keys, dtype=torch.float32, device=device)
        for index in (self.scoring_rows.nonzero()[:, 0] + self._num_plain).tolist():
            one = RowsPass(self.layers, self.rows[index : index + 1], hidden_keys=self.hidden_keys)
            query = call.query[:, :, index : index + 1]
            mass = torch.zeros(call.key.shape[1], num_keys, dtype=torch.float32, device=device)
            ops.add_query_scores(
                mass, query[0], call.key[0], lse[:, index : index + 1].contiguous(),
                one.blocks(replace(call, query=query)),
                scaling=call.scaling, softcap=call.softcap, context=self.context,
            )  # fmt: skip
            squares += mass.sum(0).div_(heads).square_()
        norms = squares.sqrt_()[None]
        self._mass[0, 0] = self._mass[0, 0] + norms if (0, 0) in self._mass else norms
        return output[None]
