"""What `bench kernels` runs: each GPU kernel on one layer's inputs, and the ways PyTorch has to do the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F

from prophetkv_rag.kernels import ops

ROTATION_BYTES = 256 << 20
"""Copies of the inputs are made until they take so much: more than any L2 cache holds."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's work; by default that of Llama-3.1-8B at 20% of 8,192 tokens."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    keys: int = 8192
    rows: int = 1638
    question: int = 64
    chunk: int = 512
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def scaling(self) -> float:
        """Factor on the logits."""
        return float(self.head_dim**-0.5)

    def positions(self) -> torch.Tensor:
        """Positions of the recomputed rows: the same scattered ones every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(self.keys, generator=generator)[: self.rows].sort().values


@dataclass(frozen=True, slots=True)
class Work:
    """Something to time: the bytes it must move, the operations it must do, and how to make a function that does it."""

    kernel: str
    variant: str
    gigabytes: float
    gigaflops: float
    make: Callable[[], Callable[[], object]]


def works(shape: Shape, device: str) -> list[Work]:
    """Return everything to time, the Triton kernel of each operation first."""
    return [*_attention(shape, device), *_scores(shape, device), *_rows(shape, device)]


def _rotating(make: Callable[[int], Sequence[Any]], run: Callable[..., object]) -> Callable[[], object]:
    """Call `run` with one set of inputs after another, so that none is found in a cache; `make(seed)` makes a set."""
    first = make(0)
    size = sum(tensor.nbytes for tensor in first if isinstance(tensor, torch.Tensor))
    sets = [first, *(make(seed) for seed in range(1, min(8, max(2, ROTATION_BYTES // max(1, size)))))]
    following = cycle(sets)
    return lambda: run(*next(following))


def _both(
    kernel: str,
    gigabytes: float,
    gigaflops: float,
    inputs: Callable[[int], Sequence[Any]],
    prepare: Callable[[], Callable[..., object]],
) -> list[Work]:
    """An operation of `ops` by the kernel and by PyTorch."""

    def maker(choice: str) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            run = prepare()

            def forced(*arguments: Any) -> object:
                with ops.force(choice):
                    return run(*arguments)

            return _rotating(inputs, forced)

        return make

    return [
        Work(kernel, name, gigabytes, gigaflops, maker(choice))
        for name, choice in (("Triton", "triton"), ("PyTorch", "reference"))
    ]


def _random(seed: int, shape: Shape, device: str, *sizes: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(sizes, device=device, generator=generator).to(shape.torch_dtype)


def _attention_inputs(shape: Shape, device: str, rows: int) -> Callable[[int], Sequence[torch.Tensor]]:
    def make(seed: int) -> Sequence[torch.Tensor]:
        sizes = ((shape.heads, rows), (shape.kv_heads, shape.keys), (shape.kv_heads, shape.keys))
        return [_random(3 * seed + i, shape, device, *size, shape.head_dim) for i, size in enumerate(sizes)]

    return make


def _attention(shape: Shape, device: str) -> list[Work]:
    positions = shape.positions()
    per_row, cache = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.keys * shape.head_dim
    size = shape.torch_dtype.itemsize
    gigabytes = (cache + 2 * per_row * shape.rows) * size / 1e9
    gigaflops = 4 * per_row * int((positions + 1).sum()) / 1e9
    inputs = _attention_inputs(shape, device, shape.rows)
    where = positions.to(device)

    def selected() -> Callable[..., object]:
        blocks = ops.RowBlocks(where, num_groups=shape.heads // shape.kv_heads)
        return lambda q, k, v: ops.selected_rows_attention(q, k, v, blocks, scaling=shape.scaling)

    def sdpa(**options: Any) -> Callable[..., object]:
        return lambda q, k, v: F.scaled_dot_product_attention(
            q[None], k[None], v[None], scale=shape.scaling, enable_gqa=True, **options
        )

    def masked() -> Callable[[], object]:
        mask = torch.arange(shape.keys, device=device)[None, :] <= where[:, None]
        return _rotating(inputs, sdpa(attn_mask=mask))

    def flex() -> Callable[[], object]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def is_seen(batch: Any, head: Any, row: Any, key: Any) -> Any:
            return key <= where[row]

        mask = create_block_mask(is_seen, None, None, shape.rows, shape.keys, device=device)
        attention: Any = torch.compile(flex_attention) if device == "cuda" else flex_attention
        return _rotating(
            inputs,
            lambda q, k, v: attention(q[None], k[None], v[None], block_mask=mask, scale=shape.scaling, enable_gqa=True),
        )

    def causal() -> Callable[[], object]:
        return _rotating(_attention_inputs(shape, device, shape.keys), sdpa(is_causal=True))

    all_bytes = (cache + 2 * per_row * shape.keys) * size / 1e9
    all_flops = 2 * per_row * shape.keys * (shape.keys + 1) / 1e9
    return [
        *_both("attention", gigabytes, gigaflops, inputs, selected),
        Work("attention", "SDPA with a mask", gigabytes, gigaflops, masked),
        Work("attention", "FlexAttention", gigabytes, gigaflops, flex),
        Work("attention", "SDPA of all rows", all_bytes, all_flops, causal),
    ]


def _scores(shape: Shape, device: str) -> list[Work]:
    per_row, cache = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.keys * shape.head_dim
    # Attention reads K and V; the log-sum-exps, and then the column sums, read K again.
    gigabytes = (2 * cache + 2 * per_row * shape.question) * shape.torch_dtype.itemsize / 1e9
    gigaflops = (4 + 2 + 2) * per_row * shape.question * shape.keys / 1e9

    def score() -> Callable[..., object]:
        rows = torch.arange(shape.keys - shape.question, shape.keys, device=device)
        blocks = ops.RowBlocks(rows, num_groups=shape.heads // shape.kv_heads)
        context = torch.arange(shape.keys, device=device) < shape.keys - shape.question
        asking = torch.ones(shape.question, dtype=torch.bool, device=device)
        mass = torch.zeros(shape.kv_heads, shape.keys, device=device)
        return lambda q, k, v: ops.attend_and_score(
            q, k, v, blocks,
            mass=mass, context=context, scoring_rows=asking, context_softmax=True, scaling=shape.scaling,
        )  # fmt: skip

    inputs = _attention_inputs(shape, device, shape.question)
    return _both("attention and scores", gigabytes, gigaflops, inputs, score)


def _rows(shape: Shape, device: str) -> list[Work]:
    size, dim = shape.torch_dtype.itemsize, shape.head_dim
    angles = torch.rand(shape.keys, dim // 2, generator=torch.Generator().manual_seed(0))
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    length = min(shape.chunk, shape.keys)
    starts = list(range(0, shape.keys - length + 1, length))
    tokens = len(starts) * length

    def empty_cache(*leading: int) -> list[torch.Tensor]:
        sizes = (*leading, shape.kv_heads, shape.keys, dim)
        return [torch.empty(sizes, dtype=shape.torch_dtype, device=device) for _ in range(2)]

    def gathered(stored: str) -> Callable[[int], Sequence[Any]]:
        def make(seed: int) -> Sequence[Any]:
            sources = []
            for number in range(2 * seed * len(starts), 2 * (seed + 1) * len(starts), 2):
                rows = [_random(number + i, shape, device, shape.kv_heads, length, dim) for i in range(2)]
                scales: list[torch.Tensor] = []
                if stored == "int8":  # as the store writes it: keys by channel, values by token, with a scale and a low
                    lows = [row.amin(along, keepdim=True).half() for along, row in enumerate(rows, 1)]
                    tops = [row.amax(along, keepdim=True).half() for along, row in enumerate(rows, 1)]
                    scales = [(top - low) / 255 for top, low in zip(tops, lows, strict=True)]
                    rows = [
                        ((row - low) / scale).round().clamp(0, 255).to(torch.uint8)
                        for row, scale, low in zip(rows, scales, lows, strict=True)
                    ]
                    scales += lows
                sources.append(ops.RowSource(*rows, *scales))
            return (*empty_cache(), sources)

        return make

    def gather(keys: torch.Tensor, values: torch.Tensor, sources: list[ops.RowSource]) -> None:
        ops.rope_gather(keys, values, sources, starts, cos[:tokens], sin[:tokens])

    def fresh(seed: int) -> Sequence[torch.Tensor]:
        heads = (shape.kv_heads, shape.kv_heads, shape.heads)
        rows = [_random(3 * seed + i, shape, device, 1, number, shape.rows, dim) for i, number in enumerate(heads)]
        return (*rows, *empty_cache(1))

    where = shape.positions().to(device)

    def scatter(key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, *out: torch.Tensor) -> None:
        ops.rope_scatter(key, value, where, *out, query=query, cos=cos[: shape.rows], sin=sin[: shape.rows])

    moved, tables = 2 * tokens * shape.kv_heads * dim, 2 * cos.nbytes
    scattered = 2 * (shape.heads + 2 * shape.kv_heads) * shape.rows * dim * size
    return [
        *_both("gather", (2 * moved * size + tables) / 1e9, 0.0, gathered("plain"), lambda: gather),
        *_both("gather from int8", (moved * (size + 1) + tables) / 1e9, 0.0, gathered("int8"), lambda: gather),
        *_both("scatter", scattered / 1e9, 0.0, fresh, lambda: scatter),
    ]
