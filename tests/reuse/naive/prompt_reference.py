"""Half of the independent reference: what a prompt is made of, and which chunk tokens a budget buys.

A prompt is a list of segments: prefix (fresh tokens before the first chunk), chunks, glue (fresh tokens between chunks)
and suffix (fresh tokens behind the last chunk). C = chunk tokens in the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Segment = tuple[Sequence[int], bool]  # token ids, is_chunk


def select(
    scores: np.ndarray, ratio: float, eligible: np.ndarray | None = None, positions: Sequence[int] | None = None
) -> list[int]:
    """The floor(ratio * C) best eligible chunk tokens, ties to the lower one, sorted.

    The 1e-9 keeps a product such as 0.29 * 100 = 28.999999999999996 from losing a token.

    Returns:
        Indices into `scores`, or the prompt positions that `positions` `[C]` gives for them.
    """
    candidates = [index for index in range(len(scores)) if eligible is None or eligible[index]]
    count = min(math.floor(ratio * len(scores) + 1e-9), len(candidates))
    best = sorted(candidates, key=lambda index: (-scores[index], index))[:count]
    return sorted(best if positions is None else [positions[index] for index in best])


def best_others(scores: np.ndarray, share: float, chosen: Sequence[int], positions: Sequence[int]) -> list[int]:
    """Of the chunk tokens at `positions` `[C]` that are not `chosen`, the floor(share * their number) best.

    Those one before a chosen one come first, then two, three and four before, then the rest; each group by its scores.
    """
    rest = [index for index in range(len(scores)) if positions[index] not in chosen]

    def group(index: int) -> int:
        return min([5, *(place - positions[index] for place in chosen if place > positions[index])])

    in_order = sorted(rest, key=lambda index: (group(index), -scores[index], index))
    best = in_order[: math.floor(share * len(rest) + 1e-9)]
    return sorted(positions[index] for index in best)


def prompt_ids(segments: Sequence[Segment]) -> list[int]:
    """All token ids, in order."""
    return [token for ids, _ in segments for token in ids]


def context_positions(segments: Sequence[Segment]) -> list[int]:
    """Positions of the chunk tokens `[C]`."""
    flags = [is_chunk for ids, is_chunk in segments for _ in ids]
    return [position for position, is_chunk in enumerate(flags) if is_chunk]


def fresh_positions(segments: Sequence[Segment]) -> list[int]:
    """Positions of everything else: prefix, glue and suffix."""
    return sorted(set(range(len(prompt_ids(segments)))) - set(context_positions(segments)))


def suffix_positions(segments: Sequence[Segment]) -> list[int]:
    """Positions of the fresh rows behind the last chunk; there must be at least one, and a chunk before it."""
    context, total = context_positions(segments), len(prompt_ids(segments))
    if not context or context[-1] == total - 1:
        raise ValueError("a prompt needs at least one chunk, and fresh tokens behind the last one")
    return list(range(context[-1] + 1, total))
