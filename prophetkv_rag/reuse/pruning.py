"""Dropping rows between layers, by hooks: what a strategy prunes in stage II, and stage I behind its last layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from prophetkv_rag.model import RowsLayer, RowsPass, decoder_layers


@dataclass(frozen=True, slots=True)
class LayerView:
    """What a strategy that prunes between layers may look at after a layer: stale against fresh rows.

    All tensors are in the order of `rows`: keys `[Hkv, m, D]` (rotated), values `[Hkv, m, Dv]`. Only chunk tokens have
    stale rows to compare with; those of other tokens are 0. `attention_received` is `[n]`, by position: the weight each
    chunk token got in this layer, averaged over heads and rows (only of layers in `Selection.watched_layers`).
    """

    layer_idx: int
    rows: torch.Tensor
    stale_keys: torch.Tensor
    stale_values: torch.Tensor
    fresh_keys: torch.Tensor
    fresh_values: torch.Tensor
    attention_received: torch.Tensor | None = None


Pruner = Callable[[LayerView], "torch.Tensor | None"]
"""Returns the positions (ascending) that go on after this layer, or `None` for all; fresh tokens always go on."""


class RowDropper(ABC):
    """Slices hidden states and rotary tables between layers, by hooks that are removed after the pass."""

    needs_stale: ClassVar[bool] = False
    """Whether layers keep the rows that they overwrite, for `choose` to look at."""

    def __init__(self, rows_pass: RowsPass, layers: Sequence[RowsLayer]) -> None:
        self.rows_pass = rows_pass
        self.layers = layers
        self.row_layers = 0
        self.num_initial = rows_pass.rows.shape[0]
        self.kept = torch.arange(self.num_initial, device=rows_pass.rows.device)  # indices into the initial rows

    @abstractmethod
    def choose(self, index: int) -> torch.Tensor | None:
        """Return the indices into the current rows that go on after layer `index`, or `None` for all."""

    @contextmanager
    def between_layers_of(self, model: Any) -> Iterator[None]:
        """Drop rows between the model's decoder layers inside the block."""
        with ExitStack() as hooks:
            for index, module in enumerate(decoder_layers(model, len(self.layers))):
                handle = module.register_forward_pre_hook(self._before_layer(index), with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def _before_layer(self, index: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            local = self.choose(index - 1) if index > 0 else None
            if local is not None:
                self.kept = self.kept[local]
                self.rows_pass.set_rows(self.rows_pass.rows[local])
                if "hidden_states" in kwargs:
                    kwargs["hidden_states"] = kwargs["hidden_states"][:, local]
                else:
                    args = (args[0][:, local], *args[1:])
            if self.kept.shape[0] < self.num_initial:
                # The model hands every layer the tables of all initial rows.
                kwargs = {name: self._slice(name, value) for name, value in kwargs.items()}
            layer = self.layers[index]
            layer.rows, layer.keep_stale = self.rows_pass.rows, self.needs_stale
            self.row_layers += self.rows_pass.rows.shape[0]
            return args, kwargs

        return hook

    def _slice(self, name: str, value: Any) -> Any:
        if name == "position_ids" and isinstance(value, torch.Tensor):
            return value[..., self.kept]
        if name == "position_embeddings" and isinstance(value, (tuple, list)):
            return tuple(table[:, self.kept] for table in value)
        if name == "position_embeddings" and isinstance(value, torch.Tensor):
            return value[:, self.kept]
        return value


class Pruning(RowDropper):
    """Lets a strategy decide after each layer, by stale and fresh rows, which rows go on."""

    needs_stale: ClassVar[bool] = True

    def __init__(
        self, rows_pass: RowsPass, layers: Sequence[RowsLayer], prune: Pruner, always: torch.Tensor | None
    ) -> None:
        super().__init__(rows_pass, layers)
        self.prune = prune
        self.always = always

    def choose(self, index: int) -> torch.Tensor | None:
        """Return the indices that the strategy keeps, and those it may not drop."""
        layer = self.layers[index]
        assert layer.stale is not None
        assert layer.fresh is not None
        rows = self.rows_pass.rows
        view = LayerView(
            layer_idx=index,
            rows=rows,
            stale_keys=layer.stale[0][0],
            stale_values=layer.stale[1][0],
            fresh_keys=layer.fresh[0][0],
            fresh_values=layer.fresh[1][0],
            attention_received=self.rows_pass.received.get(index),
        )
        layer.stale = layer.fresh = None
        kept = self.prune(view)
        if kept is None:
            return None
        mask = torch.isin(rows, kept.to(rows.device))
        if self.always is not None:
            mask |= torch.isin(rows, self.always)
        return mask.nonzero()[:, 0]


class Stopping(RowDropper):
    """Lets the last row alone go on behind a layer: a forward cannot be left half way, but one row costs little.

    What that row becomes is of no use: it runs because something must.
    """

    def __init__(self, rows_pass: RowsPass, layers: Sequence[RowsLayer], last_layer: int) -> None:
        super().__init__(rows_pass, layers)
        self.last_layer = last_layer

    def choose(self, index: int) -> torch.Tensor | None:
        """Return the last row behind the last layer."""
        if index != self.last_layer:
            return None
        return torch.tensor([self.rows_pass.rows.shape[0] - 1], device=self.rows_pass.rows.device)
