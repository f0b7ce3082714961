"""What is known of a prompt's rows: how each came to be, and which chunks left their trace in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch


class RowState(IntEnum):
    """How one token's keys and values came to be. The higher, the closer to full prefill.

    A row depends on nothing but the tokens up to its own, so it may be used wherever a prompt begins with those.

    - `STALE`: taken from a chunk's cache, encoded behind other tokens than stand before it here, and not recomputed.
    - `MOVED`: taken from a former prompt where it stood elsewhere, behind other tokens, and not recomputed.
    - `COMPUTED`: run through every layer here, but some row before it is not exact, or was kept from its sight, so its
      numbers are not full prefill's either. A strategy does not choose it again.
    - `EXACT`: run through every layer over exact rows only. Its numbers are full prefill's, but for the rounding of
      passes of other lengths; so nothing that is to equal full prefill to the bit (ratio 1.0, `full_prefill`) uses it.
    """

    STALE = 0
    MOVED = 1
    COMPUTED = 2
    EXACT = 3


@dataclass(frozen=True, slots=True)
class Trace:
    """From a position on, rows hold, or attended to, the texts of chunks, and must not outlive them.

    `keys` are that of the chunk that begins there and, by its cache, those of the chunks that it was encoded behind.
    """

    start: int
    keys: frozenset[str]


@dataclass(frozen=True, slots=True)
class KeysBefore:
    """Keys of n moved rows as they were computed, so that however often they move they are turned, and rounded, once.

    Attributes:
        start: Position of the first row in the prompt that they were moved into.
        shifts: `[n]`, int64: each row's position there minus the one that its keys are rotated to.
        keys: `[Hkv, n, D]` of each layer, on the CPU.
    """

    start: int
    shifts: torch.Tensor
    keys: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class AnsweredRows:
    """What a prefill leaves to be told of its prompt's rows, once its answer is there.

    Attributes:
        token_ids: The prompt.
        states: `[N]`, uint8: each row's `RowState`.
        traces: In order of position.
        tenant: Whose they are.
        settings: How tokens were chosen for recomputation, in any words that differ where that does.
        moved: The keys of those rows that were moved into the prompt.
    """

    token_ids: Sequence[int]
    states: torch.Tensor
    traces: tuple[Trace, ...]
    tenant: str
    settings: str = ""
    moved: Sequence[KeysBefore] = ()


def states_after(
    held: torch.Tensor,
    is_stale: torch.Tensor,
    ran: torch.Tensor,
    *,
    is_moved: torch.Tensor | None = None,
    is_blind: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the states of a prompt's rows after a prefill.

    Args:
        held: `[R]`, uint8: states of the rows that were there from a former prompt.
        is_stale: `[N]`, bool: rows that stand in the cache as a chunk's cache had them.
        ran: `[N]`, bool: rows that ran through every layer.
        is_moved: `[N]`, bool: rows that stand in the cache as a former prompt had them elsewhere; `None` for none.
        is_blind: `[N]`, bool: rows that did not see everything before them; `None` for none.

    Returns:
        `[N]`, uint8.
    """
    states = torch.full(is_stale.shape, int(RowState.EXACT), dtype=torch.uint8)
    states[is_stale] = int(RowState.STALE)
    if is_moved is not None:
        states[is_moved] = int(RowState.MOVED)
    states[: held.shape[0]] = held
    states[ran] = int(RowState.EXACT)
    if is_blind is not None:
        states[is_blind & ran] = int(RowState.COMPUTED)
    is_behind = (states != int(RowState.EXACT)).cumsum(0) > 0
    states[is_behind & (states == int(RowState.EXACT))] = int(RowState.COMPUTED)
    return states
