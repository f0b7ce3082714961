"""What the kernels must compute, densely and in float64; and the inputs, with everything around them poisoned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Of outputs, as norm of the difference over norm of the truth. (Scores are about 1/n: an absolute tolerance of 1e-3
passes for anything.)"""
SCORE_TOLERANCE = 1e-5
NAN = float("nan")


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative norm of the difference; inf if anything is not finite."""
    found = found.detach().cpu().double()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - truth).norm() / truth.norm().clamp_min(1e-300))


@dataclass
class Case:
    """Inputs of attention and scoring. Cache rows beyond the last query's position, and beyond n, are NaN.

    With `span` the keys are gathered: they stand at some of so many positions.
    """

    heads: int
    kv_heads: int
    rows: int
    keys: int
    dim: int
    dtype: torch.dtype = torch.float32
    value_dim: int | None = None
    window: int | None = None
    hidden: bool = False
    softcap: float | None = None
    sinks: bool = False
    span: int | None = None
    seed: int = 0
    device: str = "cpu"
    scaling: float = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        value_dim = self.value_dim or self.dim
        self.scaling = self.dim**-0.5
        own = torch.randperm(self.keys, generator=generator)[: self.rows].sort().values
        self.places = torch.arange(self.keys)
        if self.span is not None:
            self.places = torch.randperm(self.span, generator=generator)[: self.keys].sort().values
        self.positions = self.places[own]
        last = int(own[-1])

        def cache(dim: int) -> torch.Tensor:
            roomy = torch.full((self.kv_heads, self.keys + 9, dim), NAN)
            roomy[:, : last + 1] = torch.randn(self.kv_heads, last + 1, dim, generator=generator)
            return roomy.to(self.dtype).to(self.device)[:, : self.keys]

        # As the model's projections leave them: [m, H, D], seen as [H, m, D]. Larger than usual, for a peaked softmax.
        query = torch.randn(self.rows, self.heads, self.dim, generator=generator) * 2
        self.query = query.to(self.dtype).to(self.device).transpose(0, 1)
        self.key, self.value = cache(self.dim), cache(value_dim)
        self.sink_logits = torch.linspace(-1, 3, self.heads).to(self.dtype).to(self.device) if self.sinks else None
        self.hidden_keys = None
        if self.hidden:
            hidden = torch.rand(self.keys, generator=generator) < 0.4
            hidden[own] = False
            self.hidden_keys = hidden.to(self.device)
        self.context = (torch.rand(self.keys, generator=generator) < 0.7).to(self.device)
        self.asking = (torch.rand(self.rows, generator=generator) < 0.6).to(self.device)
        self.asking[-1] = True

    def blocks(self) -> Any:
        from prophetkv_rag.kernels import ops

        return ops.RowBlocks(
            self.positions.to(self.device),
            num_groups=self.heads // self.kv_heads,
            sliding_window=self.window,
            hidden_keys=self.hidden_keys,
            key_positions=None if self.span is None else self.places.to(self.device),
        )

    def inputs(self) -> Any:
        """As the implementations take them from `ops`, for tests that go past it."""
        from prophetkv_rag.kernels.arguments import LogitInputs

        return LogitInputs(self.query, self.key, self.blocks(), self.scaling, self.softcap)

    @property
    def settings(self) -> dict[str, Any]:
        return {"scaling": self.scaling, "softcap": self.softcap}

    def logits(self) -> torch.Tensor:
        """`[H, m, n]`, -inf for what is not seen."""
        groups = self.heads // self.kv_heads
        key = self.key.cpu().double().nan_to_num().repeat_interleave(groups, 0)
        logits = self.query.cpu().double() @ key.transpose(1, 2) * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        row, column = self.positions[:, None], self.places[None, :]
        unseen = column > row
        if self.window is not None:
            unseen = unseen | (column <= row - self.window)
        if self.hidden_keys is not None:
            unseen = unseen | self.hidden_keys.cpu()[None, :]
        return logits.masked_fill(unseen, float("-inf"))

    def attention(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output `[m, H, Dv]`, log-sum-exp `[H, m]`, weights `[H, m, n]`."""
        logits = self.logits()
        lse = torch.logsumexp(logits, -1)
        if self.sink_logits is not None:
            lse = torch.logaddexp(lse, self.sink_logits.cpu().double()[:, None])
        weights = (logits - lse[..., None]).exp()
        groups = self.heads // self.kv_heads
        value = self.value.cpu().double().nan_to_num().repeat_interleave(groups, 0)
        return (weights @ value).transpose(0, 1), lse, weights

    def mass(self, context_softmax: bool) -> torch.Tensor:
        """`[n]`: the mean over heads and asking rows of the weights on the context."""
        weights = self.attention()[2] * self.context.cpu()
        if context_softmax:
            logits = self.logits().masked_fill(~self.context.cpu(), float("-inf"))
            lse = torch.logsumexp(logits, -1, keepdim=True)
            weights = torch.where(lse.isneginf(), 0.0, (logits - lse).exp())
        return weights[:, self.asking.cpu()].mean(dim=(0, 1))


def rotated(states: torch.Tensor, angles: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Turn pairs of channels of `[..., n, D]` by `angles [n, r]`, as complex numbers, in float64."""
    states, half = states.double(), angles.shape[-1]
    pair = [2 * i for i in range(half)] if interleaved else list(range(half))
    other = [2 * i + 1 for i in range(half)] if interleaved else [half + i for i in range(half)]
    turned = torch.complex(states[..., pair], states[..., other]) * torch.polar(torch.ones_like(angles), angles)
    out = states.clone()
    out[..., pair], out[..., other] = turned.real, turned.imag
    return out
