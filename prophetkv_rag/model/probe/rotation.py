"""Question 1 of the probe: which of the model's own frequency tables a layer's keys are rotated by."""

from __future__ import annotations

from typing import Any

import torch

from prophetkv_rag.errors import UnsupportedModelError
from prophetkv_rag.model.attention import AttentionCall
from prophetkv_rag.model.devices import in_float64
from prophetkv_rag.model.probe.tolerance import relative_error, tolerance_of
from prophetkv_rag.model.rope import RopeTables, Rotation

# An angle computed in fp32, as models do, is off by up to this much per position.
ANGLE_ERROR_PER_POSITION = 2.4e-7


def rotation_candidates(model: Any) -> list[Rotation]:
    """Return the model's own frequency tables: every buffer named `*inv_freq`, paired both ways, turning both ways."""
    tables = []
    for module in model.modules():
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if buffer_name.endswith("inv_freq") and "original" not in buffer_name and buffer.ndim == 1:
                frequencies = tuple(in_float64(buffer).tolist())
                if frequencies and frequencies not in tables:
                    tables.append(frequencies)
    return [
        Rotation(tuple(sign * frequency for frequency in table), interleaved)
        for sign in (1.0, -1.0)
        for table in tables
        for interleaved in (False, True)
    ]


def find_rotation(
    index: int, origin: AttentionCall, moved: dict[int, AttentionCall], candidates: list[Rotation]
) -> Rotation | None:
    """Return the rotation that explains this layer's keys at every probed position; `None` for no rotation at all."""
    tolerance = tolerance_of(origin.key.dtype)
    for position, call in moved.items():
        if relative_error(call.value, origin.value) > tolerance:
            msg = f"layer {index}'s values change with the position (learned absolute positions?), seen at {position}"
            raise UnsupportedModelError(msg)
    if all(relative_error(call.key, origin.key) <= tolerance for call in moved.values()):
        return None
    worst: dict[int, float] = {}
    for candidate in candidates:
        if candidate.rotary_dim > origin.key.shape[-1]:
            continue
        errors = {}
        for position, call in moved.items():
            tables = RopeTables(torch.tensor([position], device=call.key.device))
            errors[position] = relative_error(tables.rotate(origin.key, candidate), call.key)
        if all(error <= tolerance + ANGLE_ERROR_PER_POSITION * position for position, error in errors.items()):
            return candidate
        worst = min(worst or errors, errors, key=lambda found: sum(found.values()))
    near, far = min(moved), max(moved)
    if worst and worst[near] <= tolerance and worst[far] > tolerance:
        msg = (
            f"layer {index}'s rotation fits near the start but not at position {far} (error {worst[far]:.1e}): its "
            "frequencies depend on the prompt's length (longrope or dynamic scaling)"
        )
    else:
        msg = f"layer {index}'s keys at a new position are not its keys at position 0, rotated by a known table"
    raise UnsupportedModelError(msg)
