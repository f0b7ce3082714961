"""In which order, and in which batches, chunks are encoded that stand behind each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence


def waves(
    lengths: Mapping[str, int], behind: Mapping[str, Sequence[str]], *, batch_tokens: int, is_chained: bool
) -> Iterator[list[str]]:
    """Batch chunks so that what a chunk stands behind is encoded before it, where they are chained.

    Chained chunks go document by document, several documents side by side: one chunk of each at a time. Others go by
    what they have in common: each next chunk is one that stands behind the one before, where there is such a one, so
    that the caches of neighbours are used again while they are at hand.

    Args:
        lengths: Key -> number of tokens.
        behind: Key -> keys of the chunks before it, among these or not.
        batch_tokens: Upper bound of tokens in a batch, padding included (one chunk is always allowed).
        is_chained: Whether a chunk needs what it stands behind to be encoded first.
    """
    chains = _chains(lengths, behind) if is_chained else [deque([key]) for key in _close_together(lengths, behind)]
    waiting = deque(chains)
    active: list[deque[str]] = []
    while waiting or active:
        # As many documents side by side as fit a batch; a new one takes the place of one that has ended.
        while waiting and _fits([chain[0] for chain in (*active, waiting[0])], lengths, batch_tokens):
            active.append(waiting.popleft())
        wave: list[str] = []
        for chain in active:
            if wave and not _fits([*wave, chain[0]], lengths, batch_tokens):
                continue
            wave.append(chain[0])
        yield wave
        for chain in active:
            if chain[0] in wave:
                chain.popleft()
        active = [chain for chain in active if chain]


def _fits(keys: Sequence[str], lengths: Mapping[str, int], batch_tokens: int) -> bool:
    return len(keys) == 1 or max(lengths[key] for key in keys) * len(keys) <= batch_tokens


def _chains(lengths: Mapping[str, int], behind: Mapping[str, Sequence[str]]) -> list[deque[str]]:
    """Group what depends on each other; a chunk joins the group of the last one before it."""
    chain_of: dict[str, deque[str]] = {}
    chains: list[deque[str]] = []
    for key in in_order(lengths, behind):
        joined = [chain_of[one] for one in behind.get(key, ()) if one in chain_of]
        if joined:
            chain = joined[-1]
        else:
            chain = deque()
            chains.append(chain)
        chain.append(key)
        chain_of[key] = chain
    return chains


def in_order(keys: Collection[str], behind: Mapping[str, Sequence[str]]) -> list[str]:
    """Order chunks so that what stands before a chunk comes first; a circle is cut where it is met."""
    ordered: dict[str, None] = {}
    met: set[str] = set()
    for first in keys:
        stack = [first]
        while stack:
            key = stack[-1]
            left = [one for one in behind.get(key, ()) if one in keys and one not in met]
            met.add(key)
            if left:
                stack.append(left[0])
            else:
                ordered.setdefault(stack.pop())
    return list(ordered)


def _close_together(lengths: Mapping[str, int], behind: Mapping[str, Sequence[str]]) -> list[str]:
    """Order chunks so that neighbours follow each other: breadth first from each chunk that is left."""
    left = dict.fromkeys(lengths)
    ordered: list[str] = []
    while left:
        queue = deque([next(iter(left))])
        while queue:
            key = queue.popleft()
            if key in left:
                del left[key]
                ordered.append(key)
                queue.extend(one for one in reversed(behind.get(key, ())) if one in left)
    return ordered
