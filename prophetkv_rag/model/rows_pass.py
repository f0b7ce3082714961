"""The forward pass of query time: any rows of a prompt over an assembled cache, plain or with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from prophetkv_rag.kernels import ops
from prophetkv_rag.model.attention import AttentionCall, AttentionPass
from prophetkv_rag.model.support import LayerSupport


class RowsPass(AttentionPass):
    """Computes rows at their true positions over a cache that holds a row for every position of the prompt.

    Used by stage II and by plain reuse; stage I adds scoring (`ScoringPass`).
    """

    def __init__(
        self,
        layers: Sequence[LayerSupport],
        rows: torch.Tensor,
        *,
        hidden_keys: torch.Tensor | None = None,
        key_positions: torch.Tensor | None = None,
        last_row_only: bool = False,
        watched: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        """Prepare the pass.

        Args:
            layers: The probe's findings.
            rows: `[m]`, ascending positions.
            hidden_keys: `[n]`, bool: seen by no row.
            key_positions: `[n]`, ascending positions of the keys that calls will bring; `None` for every position.
            last_row_only: Only the last row's final state is wanted (for its logits). The last layer's keys and values
                come before its attention, so the other rows need not attend there.
            watched: Per layer to watch, `[n]`, bool: the keys whose received attention is wanted (`received`).
        """
        self.layers = layers
        self.rows = rows
        self.hidden_keys = hidden_keys
        self.key_positions = key_positions
        self.last_row_only = last_row_only
        self.watched = watched or {}
        self.received: dict[int, torch.Tensor] = {}
        """Of the watched layers, `[n]` in fp32: the attention each key received, averaged over heads and rows."""
        self._blocks: dict[tuple[int, int | None], ops.RowBlocks] = {}

    def set_rows(self, rows: torch.Tensor) -> None:
        """Go on with fewer rows (strategies that prune between layers)."""
        self.rows = rows
        self._blocks = {}

    def blocks(self, call: AttentionCall) -> ops.RowBlocks:
        """Return the row blocks for this call's group size and window; layers share them."""
        groups = call.query.shape[1] // call.key.shape[1]
        window = self.layers[call.layer_idx].sliding_window
        if (groups, window) not in self._blocks:
            self._blocks[groups, window] = ops.RowBlocks(
                self.rows,
                num_groups=groups,
                sliding_window=window,
                hidden_keys=self.hidden_keys,
                key_positions=self.key_positions,
            )
        return self._blocks[groups, window]

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attend over the cache, causally by position."""
        num_rows = call.query.shape[2]
        if self.last_row_only and call.layer_idx == len(self.layers) - 1 and num_rows > 1:
            last = RowsPass(self.layers, self.rows[-1:], hidden_keys=self.hidden_keys, key_positions=self.key_positions)
            output = last.attend(replace(call, query=call.query[:, :, -1:]))
            return F.pad(output, (0, 0, 0, 0, num_rows - 1, 0))
        if call.layer_idx in self.watched:
            mass = torch.zeros(call.key.shape[1:3], dtype=torch.float32, device=call.key.device)
            output = ops.attend_and_score(
                call.query[0],
                call.key[0],
                call.value[0],
                self.blocks(call),
                mass=mass,
                context=self.watched[call.layer_idx],
                scoring_rows=torch.ones(num_rows, dtype=torch.bool, device=call.query.device),
                context_softmax=False,
                scaling=call.scaling,
                softcap=call.softcap,
                sinks=call.sinks,
            )
            self.received[call.layer_idx] = mass.sum(0).div_(num_rows * call.query.shape[1])
            return output[None]
        output = ops.selected_rows_attention(
            call.query[0],
            call.key[0],
            call.value[0],
            self.blocks(call),
            scaling=call.scaling,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        return output[None]


class ScoringPass(RowsPass):
    """A `RowsPass` that also sums, over layers, the attention mass each context token gets from the scoring rows."""

    def __init__(
        self,
        layers: Sequence[LayerSupport],
        rows: torch.Tensor,
        *,
        context: torch.Tensor,
        scoring_rows: torch.Tensor,
        context_softmax: bool,
        first_layer: int = 0,
        last_layer: int | None = None,
        hidden_keys: torch.Tensor | None = None,
    ) -> None:
        """Prepare the pass; `context` is `[n]` bool, `scoring_rows` `[m]` bool (see `ops.attend_and_score`).

        Layers before `first_layer` and behind `last_layer` (`None`: the model's) attend and do not count.
        """
        super().__init__(layers, rows, hidden_keys=hidden_keys)
        self.context = context
        # Rows before the first scoring row (the prompt's prefix) need no explicit weights.
        self._num_plain = int(scoring_rows.nonzero()[0])
        self._plain = RowsPass(layers, rows[: self._num_plain], hidden_keys=hidden_keys)
        self._asking = RowsPass(layers, rows[self._num_plain :], hidden_keys=hidden_keys)
        self.scoring_rows = scoring_rows[self._num_plain :]
        self.context_softmax = context_softmax
        self.counted = range(first_layer, len(layers) if last_layer is None else last_layer + 1)
        self._mass: dict[tuple[int, int], torch.Tensor] = {}  # by heads and key/value heads, which may differ by layer

    @property
    def scores(self) -> torch.Tensor:
        """`[n]` in fp32: the mean over heads and scoring rows of the weights, summed over the layers that count."""
        total = torch.zeros(self.context.shape, dtype=torch.float32, device=self.context.device)
        for (num_heads, _), mass in self._mass.items():
            total += mass.sum(0).div_(num_heads * int(self.scoring_rows.sum()))
        return total

    def restart(self) -> None:
        """See `AttentionPass`."""
        self._mass.clear()

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attend, adding this layer's mass to that of the layers before it."""
        if call.layer_idx not in self.counted:
            return super().attend(call)
        heads = (call.query.shape[1], call.key.shape[1])
        if heads not in self._mass:
            self._mass[heads] = torch.zeros(
                heads[1], self.context.shape[0], dtype=torch.float32, device=self.context.device
            )
        asking = replace(call, query=call.query[:, :, self._num_plain :])
        output = ops.attend_and_score(
            asking.query[0],
            call.key[0],
            call.value[0],
            self._asking.blocks(asking),
            mass=self._mass[heads],
            context=self.context,
            scoring_rows=self.scoring_rows,
            context_softmax=self.context_softmax,
            scaling=call.scaling,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        if self._num_plain == 0:
            return output[None]
        plain = self._plain.attend(replace(call, query=call.query[:, :, : self._num_plain]))
        return torch.cat([plain, output[None]], dim=1)
