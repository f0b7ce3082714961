"""What the probe found out about a model: facts per layer that the passes rely on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prophetkv_rag.model.rope import Rotation


@dataclass(frozen=True, slots=True)
class LayerSupport:
    """One decoder layer.

    Attributes:
        rotation: How keys are rotated, or `None` for a layer without RoPE.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads.
        head_dim: Channels of a key.
        value_head_dim: Channels of a value.
        sliding_window: A row at p sees positions > p - sliding_window; `None` for full attention.
        softcap: Logit soft-capping, or `None`.
        has_sinks: Whether learned sink logits join the softmax.
        max_error: Largest relative error of the layer's keys and values against the model's own forward.
    """

    rotation: Rotation | None
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool
    max_error: float

    @property
    def longest_wavelength(self) -> float | None:
        """Positions for a full turn of the slowest channel pair; tells frequency tables apart at a glance."""
        if self.rotation is None:
            return None
        return 2 * math.pi / min(abs(frequency) for frequency in self.rotation.inv_freq)

    @property
    def rope(self) -> str:
        """`"none"`, `"half"` or `"interleaved"`, with the rotated part of the head where it is partial."""
        if self.rotation is None:
            return "none"
        kind = "interleaved" if self.rotation.interleaved else "half"
        if self.rotation.rotary_dim == self.head_dim:
            return kind
        return f"{kind} {self.rotation.rotary_dim}/{self.head_dim}"


@dataclass(frozen=True, slots=True)
class ModelSupport:
    """A model that passed the probe.

    Attributes:
        model_type: The configuration's own name for the family; for people, nothing depends on it.
        context_window: Largest number of positions the model was made for.
        dtype: Dtype the model computes in.
        layers: One entry per decoder layer.
    """

    model_type: str
    context_window: int
    dtype: str
    layers: tuple[LayerSupport, ...]

    def to_rows(self) -> list[dict[str, Any]]:
        """One plain dictionary per layer, for tables and JSON."""
        return [
            {
                "layer": index,
                "rope": layer.rope,
                "longest_wavelength": layer.longest_wavelength,
                "heads": layer.num_attention_heads,
                "kv_heads": layer.num_key_value_heads,
                "head_dim": layer.head_dim,
                "sliding_window": layer.sliding_window,
                "softcap": layer.softcap,
                "sinks": layer.has_sinks,
                "max_error": layer.max_error,
            }
            for index, layer in enumerate(self.layers)
        ]
