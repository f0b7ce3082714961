"""Rotary position embeddings from float64 tables: how stored, un-rotated keys get their positions, exactly once.

Angles computed in fp32, as models do, are off by 5e-4 at position 8000; a table built in float64 and rounded once is
not. Which rotation a layer uses is found by the probe (`probe/rotation.py`), not by the model's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prophetkv_rag.kernels import ops
from prophetkv_rag.model.devices import in_float64


@dataclass(frozen=True, slots=True)
class Rotation:
    """How one layer rotates its queries and keys.

    Attributes:
        inv_freq: `[rotary_dim // 2]` inverse frequencies, as the model holds them (they are fp32 numbers).
        interleaved: Whether the pairs are neighbours (2i, 2i + 1), as in Cohere and GLM, or half a rotary dim apart
            (i, i + rotary_dim // 2), as in Llama.
    """

    inv_freq: tuple[float, ...]
    interleaved: bool

    @property
    def rotary_dim(self) -> int:
        """Leading channels of a head that are rotated; the rest passes through (partial rotary)."""
        return 2 * len(self.inv_freq)


class RopeTables:
    """cos/sin tables for given positions, one pair per distinct rotation, made in float64 and rounded once, to fp32."""

    def __init__(self, position_ids: torch.Tensor) -> None:
        """Prepare tables for `position_ids` (`[n]`, int64)."""
        self.position_ids = position_ids
        self._tables: dict[tuple[float, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def cos_sin(self, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each `[n, rotary_dim // 2]`."""
        if rotation.inv_freq not in self._tables:
            positions, device = in_float64(self.position_ids), self.position_ids.device
            inv_freq = torch.tensor(rotation.inv_freq, dtype=torch.float64, device=positions.device)
            angles = positions[:, None] * inv_freq
            self._tables[rotation.inv_freq] = (angles.cos().float().to(device), angles.sin().float().to(device))
        return self._tables[rotation.inv_freq]

    def rotate(self, states: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        """Rotate un-rotated `states` (`[..., n, head_dim]`) to the positions; `None` (no RoPE) returns them as is."""
        if rotation is None:
            return states
        cos, sin = self.cos_sin(rotation)
        return ops.rotate(states, cos, sin, interleaved=rotation.interleaved)

    def gather(
        self,
        key_out: torch.Tensor,
        value_out: torch.Tensor,
        sources: Sequence[ops.RowSource],
        starts: Sequence[int],
        rotation: Rotation | None,
    ) -> None:
        """Put chunks into one cache (`ops.rope_gather`), keys rotated to `position_ids`: the chunks', joined."""
        if rotation is None:
            ops.rope_gather(key_out, value_out, sources, starts, None, None)
            return
        cos, sin = self.cos_sin(rotation)
        ops.rope_gather(key_out, value_out, sources, starts, cos, sin, interleaved=rotation.interleaved)
