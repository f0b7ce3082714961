"""Runs passes on vLLM's own module: its projections, norms, MLPs, quantised linears and collectives, our attention.

vLLM's attention looks its layer up in the forward context. During a pass a context of ours stands there, in which every
attention layer of the model is replaced by a `_Seat`, which hands the call to the passes. Nothing of vLLM is patched.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from prophetkv_rag.errors import UnsupportedModelError
from prophetkv_rag.model import AttentionCall, PassJob


class VLLMRunner:
    """A `Runner` on a model that vLLM has loaded, in the process that holds it (or this rank's part of it).

    Attributes:
        model: The module.
        layers: Its attention layers, in order of depth.
        device: Where it is.
    """

    def __init__(self, vllm_config: Any, layer_names: Sequence[str]) -> None:
        """Find the module whose attention layers have these names.

        Raises:
            UnsupportedModelError: If it cannot be found, or has layers of another kind.
        """
        self._config = vllm_config
        known = vllm_config.compilation_config.static_forward_context
        self.model = _module_with(known, layer_names)
        # A draft model's layers, too, keep keys and values there.
        own = [name for name in layer_names if _submodule(self.model, name) is known[name]]
        strange = [name for name in own if not isinstance(known[name], Attention)]
        if strange:
            msg = f"layer {strange[0]} is a {type(known[strange[0]]).__name__}, not keys and values a token"
            raise UnsupportedModelError(msg)
        self.layers: list[Any] = [known[name] for name in sorted(own, key=extract_layer_index)]
        self.device: torch.device = next(self.model.parameters()).device

    @property
    def num_ranks(self) -> int:
        """Processes that the model's heads are split over."""
        return int(get_tensor_model_parallel_world_size())

    @property
    def rank(self) -> int:
        """This process among them."""
        return int(get_tp_group().rank_in_group)

    def run(self, jobs: Sequence[PassJob], *, logits: bool = False) -> list[torch.Tensor | None]:
        """See `Runner`: all jobs in one forward. Logits are vLLM's own business."""
        assert not logits
        input_ids = torch.cat([job.input_ids.reshape(-1) for job in jobs])
        positions = torch.cat([job.position_ids.reshape(-1) for job in jobs])
        seats = {layer.layer_name: _Seat(index, layer, jobs) for index, layer in enumerate(self.layers)}
        context = create_forward_context(None, self._config, skip_compiled=True)
        context = dataclasses.replace(context, no_compile_layers={**context.no_compile_layers, **seats})
        with override_forward_context(context), torch.inference_mode():
            self.model(input_ids=input_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
        return [None] * len(jobs)

    def mean_over_ranks(self, scores: torch.Tensor) -> torch.Tensor:
        """See `Runner`."""
        if self.num_ranks == 1:
            return scores
        mean: torch.Tensor = get_tp_group().all_reduce(scores.clone()) / self.num_ranks
        # A reduction may round otherwise on each rank, and the ranks must choose the same tokens.
        return torch.as_tensor(get_tp_group().broadcast(mean.contiguous(), src=0))

    def all_agree(self, flags: Sequence[bool]) -> list[bool]:
        """Return where all ranks say yes. Every rank must call this with as many flags."""
        if self.num_ranks == 1 or not flags:
            return list(flags)
        votes = torch.tensor([int(flag) for flag in flags], dtype=torch.float32, device=self.device)
        total = get_tp_group().all_reduce(votes)
        return [bool(votes_for == self.num_ranks) for votes_for in total.tolist()]

    def all_same(self, values: Sequence[int]) -> list[bool]:
        """Return where all ranks have the same number, and not 0. Every rank must call this with as many."""
        if self.num_ranks == 1 or not values:
            return [bool(value) for value in values]
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        first = torch.as_tensor(get_tp_group().broadcast(mine.clone(), src=0))
        return self.all_agree(((mine == first) & (mine != 0)).tolist())


class _Seat:
    """Stands in for one attention layer during a pass; `unified_attention_with_output` calls its `impl`."""

    def __init__(self, index: int, layer: Any, jobs: Sequence[PassJob]) -> None:
        self.layer_name = layer.layer_name
        self.kv_cache = layer.kv_cache
        self.impl = SimpleNamespace(forward=self._forward, do_kv_cache_update=_write_nothing)
        self._index, self._layer, self._jobs = index, layer, jobs

    def __getattr__(self, name: str) -> Any:
        # Whatever else a release of vLLM asks of a layer is the layer's own.
        return getattr(self._layer, name)

    def _forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        start = 0
        for job in self._jobs:
            batch, length = job.input_ids.shape
            rows = slice(start, start + batch * length)
            start = rows.stop

            def heads(states: torch.Tensor, rows: slice = rows, batch: int = batch) -> torch.Tensor:
                return states[rows].view(batch, -1, *states.shape[1:]).transpose(1, 2)  # [b, H, m, D]

            keys, values = job.layers[self._index].update(heads(key), heads(value))
            call = AttentionCall(
                layer_idx=self._index,
                query=heads(query),
                key=keys,
                value=values,
                scaling=float(self._layer.impl.scale),
                sliding_window=self._layer.sliding_window,
                softcap=float(getattr(self._layer.impl, "logits_soft_cap", None) or 0) or None,
                sinks=None,
                attention_mask=None,
                extra={},
            )
            output[rows] = job.attention_pass.attend(call).flatten(0, 1).to(output.dtype)
        return output


def _write_nothing(*args: Any, **kwargs: Any) -> None:
    """Rows reach vLLM's pages only when a prompt's layer is whole (`pages.py`)."""


def _module_with(known: dict[str, Any], layer_names: Sequence[str]) -> Any:
    """Find the loaded model: vLLM hands it to no connector, but everything in Python can be found."""
    name = min(layer_names, key=extract_layer_index)
    for found in gc.get_objects():
        # By its type: to ask some objects for their class prints a warning.
        if issubclass(type(found), torch.nn.Module) and _submodule(found, name) is known[name]:
            return found
    msg = f"vLLM's model with the layer {name} cannot be found in this process"
    raise UnsupportedModelError(msg)


def _submodule(module: torch.nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = found._modules.get(part) if isinstance(found, torch.nn.Module) else None
        if found is None:
            return None
    return found
