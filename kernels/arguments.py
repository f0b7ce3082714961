"""What goes through the operations together: `ops` ties it up, both implementations take it so."""

from __future__ import annotations

from typing import NamedTuple

import torch

from prophetkv_rag.kernels.row_blocks import RowBlocks


class Angles(NamedTuple):
    """A rotation of n rows: `cos` and `sin` are `[n, r]`, fp32; see `ops.rotate`."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    def of_rows(self, first: int, last: int) -> Angles:
        """Return those of the rows from `first` up to `last`."""
        return Angles(self.cos[first:last], self.sin[first:last], self.interleaved)


class States(NamedTuple):
    """Keys and values of some rows or of a cache, `[..., Hkv, rows, D]` each, and queries that go along."""

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor | None = None


class LogitInputs(NamedTuple):
    """What logits are made of: `query` is `[H, m, D]`, `keys` `[Hkv, n, D]`; see `ops.selected_rows_attention`."""

    query: torch.Tensor
    keys: torch.Tensor
    blocks: RowBlocks
    scaling: float
    softcap: float | None

    @property
    def heads(self) -> int:
        """Size H."""
        return int(self.query.shape[0])

    @property
    def num_rows(self) -> int:
        """Size m."""
        return int(self.query.shape[1])

    @property
    def dim(self) -> int:
        """Size D."""
        return int(self.query.shape[2])

    @property
    def kv_heads(self) -> int:
        """Size Hkv."""
        return int(self.keys.shape[0])

    @property
    def num_keys(self) -> int:
        """Size n."""
        return int(self.keys.shape[1])


class Scoring(NamedTuple):
    """Who asks (`[m]`), for which keys (`[n]`), and where it is added (`[Hkv, n]`); see `ops.attend_and_score`."""

    mass: torch.Tensor
    context: torch.Tensor
    scoring_rows: torch.Tensor
    context_softmax: bool
