"""Question 3 of the probe: which keys a layer's mask shows a row."""

from __future__ import annotations

import torch

from prophetkv_rag.errors import UnsupportedModelError
from prophetkv_rag.model.attention import AttentionCall
from prophetkv_rag.model.probe.calls import MaskRecorder

MAX_MASK_POSITIONS = 1 << 20


def window_of(index: int, call: AttentionCall, masks: MaskRecorder, context_window: int) -> int | None:
    """Return the sliding window that the layer's mask really draws inside the context window, or `None` for all."""
    rule = masks.rule_of(call.attention_mask)
    last = min(context_window, MAX_MASK_POSITIONS) - 1
    if rule is None:
        return call.sliding_window if call.sliding_window is not None and call.sliding_window <= last else None
    windows = set()
    for row in (last, last - 1, last // 2 + 1):
        keys = torch.arange(last + 1)
        visible = rule(torch.tensor(0), torch.tensor(0), torch.tensor(row), keys).expand(last + 1)
        first = int(visible.to(torch.int8).argmax())
        if not bool(visible[first : row + 1].all()) or bool(visible[row + 1 :].any()):
            msg = f"layer {index}'s mask is neither causal nor a sliding window"
            raise UnsupportedModelError(msg)
        windows.add(None if first == 0 else row - first + 1)
    # A window longer than half the context hides nothing from the middle row.
    windows = windows if len(windows) == 1 else windows - {None}
    if len(windows) != 1:
        msg = f"layer {index} attends in chunks, which a shifted chunk cache cannot reproduce"
        raise UnsupportedModelError(msg)
    return windows.pop()
