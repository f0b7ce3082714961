"""Stage II: only the given rows run through the model again, writing fresh keys and values in place.

Right after the embedding the hidden states are those of the given rows alone (arXiv 2602.02579, section 4.3 and
Algorithm 1): at every layer their keys and values replace the stale ones, then each row attends causally, by its true
position, to the merged cache. Tokens outside the chunks ride in the same pass. A strategy may say that recomputed
tokens see a part of the cache only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from prophetkv_rag.model import ModelSupport, RowsLayer, RowsPass, SparsePass, cache_of, decoder_layers, run_pass


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


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What stage II did.

    Attributes:
        logits: `[1, vocab]` of the prompt's last token, fp32.
        rows: The positions that ran through every layer.
        row_layers: Rows x layers that were run.
    """

    logits: torch.Tensor
    rows: torch.Tensor
    row_layers: int


Pruner = Callable[[LayerView], "torch.Tensor | None"]
"""Returns the positions (ascending) that go on after this layer, or `None` for all; fresh tokens always go on."""


def recompute_rows(
    model: Any,
    support: ModelSupport,
    layers: Sequence[RowsLayer],
    input_ids: torch.Tensor,
    rows: torch.Tensor,
    *,
    always: torch.Tensor | None = None,
    prune: Pruner | None = None,
    watched: Mapping[int, torch.Tensor] | None = None,
    visible: torch.Tensor | None = None,
) -> Recomputed:
    """Run `rows` through all layers over the assembled cache.

    Args:
        model: The language model.
        support: The probe's findings.
        layers: The assembled cache; its rows are overwritten in place, all others are left untouched bit by bit.
        input_ids: `[N]` token ids of the prompt.
        rows: `[m]` ascending positions to compute; the last one must be the prompt's last token.
        always: Positions that pruning never drops (the tokens outside the chunks).
        prune: Called after each layer; what it drops keeps the fresh keys and values of the layers so far.
        watched: See `RowsPass`; what was received is handed to `prune`.
        visible: `[N]`, bool: the keys that rows outside `always` see, their own among them; `None` for all.

    Raises:
        ValueError: For `visible` together with `watched`, which counts the attention to all keys.
    """
    rows_pass = _pass_of(support, rows, always=always, watched=watched, visible=visible)
    num_layers = len(support.layers)
    if prune is None:
        for layer in layers:
            layer.rows = rows
        logits = run_pass(
            model,
            rows_pass,
            input_ids=input_ids[None, rows],
            position_ids=rows[None],
            cache=cache_of(layers),
            logits=True,
        )
        assert logits is not None
        return Recomputed(logits, rows, rows.shape[0] * num_layers)

    pruning = _Pruning(rows_pass, layers, prune, always)
    with ExitStack() as hooks:
        for index, module in enumerate(decoder_layers(model, num_layers)):
            handle = module.register_forward_pre_hook(pruning.before_layer(index), with_kwargs=True)
            hooks.callback(handle.remove)
        logits = run_pass(
            model,
            rows_pass,
            input_ids=input_ids[None, rows],
            position_ids=rows[None],
            cache=cache_of(layers),
            logits=True,
        )
    assert logits is not None
    return Recomputed(logits, rows_pass.rows, pruning.row_layers)


def _pass_of(
    support: ModelSupport,
    rows: torch.Tensor,
    *,
    always: torch.Tensor | None,
    watched: Mapping[int, torch.Tensor] | None,
    visible: torch.Tensor | None,
) -> RowsPass:
    if visible is None:
        return RowsPass(support.layers, rows, last_row_only=True, watched=watched)
    if watched:
        msg = "a selection with `watched_layers` cannot have `visible` tokens; give one of the two"
        raise ValueError(msg)
    narrow = torch.ones_like(visible)
    if always is not None:
        narrow[always] = False
    narrow[rows[-1:]] = False
    return SparsePass(support.layers, rows, narrow=narrow, visible=visible)


class _Pruning:
    """Slices hidden states and rotary tables between layers, by hooks that are removed after the pass."""

    def __init__(
        self, rows_pass: RowsPass, layers: Sequence[RowsLayer], prune: Pruner, always: torch.Tensor | None
    ) -> None:
        self.rows_pass = rows_pass
        self.layers = layers
        self.prune = prune
        self.always = always
        self.row_layers = 0
        self.num_initial = rows_pass.rows.shape[0]
        self.kept = torch.arange(self.num_initial, device=rows_pass.rows.device)  # indices into the initial rows

    def before_layer(self, index: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(
            module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            local = self._choose(index - 1) if index > 0 else None
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
            layer.rows, layer.keep_stale = self.rows_pass.rows, True
            self.row_layers += self.rows_pass.rows.shape[0]
            return args, kwargs

        return hook

    def _choose(self, index: int) -> torch.Tensor | None:
        """Return the indices into the current rows that go on after layer `index`."""
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

    def _slice(self, name: str, value: Any) -> Any:
        if name == "position_ids" and isinstance(value, torch.Tensor):
            return value[..., self.kept]
        if name == "position_embeddings" and isinstance(value, (tuple, list)):
            return tuple(table[:, self.kept] for table in value)
        if name == "position_embeddings" and isinstance(value, torch.Tensor):
            return value[:, self.kept]
        return value
