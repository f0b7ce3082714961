"""The scheduler's memory of answered prompts, so that the next turn of a conversation has their blocks again.

vLLM's prefix cache finds a block by a hash that is chained over all tokens before it. Blocks of prompts with reused
chunks have chains of their own (`salted`), which nobody else's request comes to by its tokens alone. A prompt that
begins with a former one, of the same tenant, settings and chunk caches, is put on that one's chain as far as both have
the same tokens, and on one of its own from there. Only hashes, lengths and the keys of chunks are kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_HASHES = 1 << 18
"""Hashes of blocks that are kept at most, 32 bytes each; the least recently used prompts go first."""


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Where a chunk's rows in a prompt came from; two prompts have the same rows only if this is the same.

    Attributes:
        key: Of the cache.
        start: Position of the first token.
        stop: Behind the last one.
        skipped: Tokens of the chunk before it.
        behind: Keys of the chunks that the cache was encoded behind.
        version: Tells apart the caches that a key had one after the other; 0 for none.
    """

    key: str
    start: int
    stop: int
    skipped: int
    behind: tuple[str, ...]
    version: int


@dataclass(frozen=True, slots=True)
class Former:
    """What a prompt goes on from: a chain of blocks, of which the first `num_same` are known to hold its tokens."""

    hashes: tuple[bytes, ...] = ()
    num_same: int = 0


@dataclass(frozen=True, slots=True)
class _Turn:
    """An answered prompt: its length, its chunks, and the chain of its blocks and its answer's."""

    length: int
    chunks: tuple[ChunkRows, ...]
    hashes: tuple[bytes, ...]


_Name = tuple[str, bytes, int, bytes]  # settings, chain of the prompt's whole blocks, the tokens behind them


class Turns:
    """Prompts that were answered; for one thread.

    Args:
        block_size: Tokens of one of vLLM's blocks.
        most_hashes: Bound of what is kept.
    """

    def __init__(self, block_size: int, *, most_hashes: int = MOST_HASHES) -> None:
        self._block_size = block_size
        self._most_hashes = most_hashes
        self._turns: OrderedDict[_Name, _Turn] = OrderedDict()
        self._names: dict[tuple[str, bytes], list[_Name]] = {}
        self._num_hashes = 0

    def __len__(self) -> int:
        return len(self._turns)

    def are_known(self, plain: Sequence[bytes], input_ids: Sequence[int]) -> bool:
        """Whether these are the hashes of a prompt's blocks, one for each; without them nothing is remembered."""
        return len(plain) == len(input_ids) // self._block_size > 0

    def keep(
        self,
        settings: str,
        plain: Sequence[bytes],
        input_ids: Sequence[int],
        chunks: tuple[ChunkRows, ...],
        hashes: Sequence[bytes],
    ) -> None:
        """Remember an answered prompt.

        Args:
            settings: Of the request.
            plain: vLLM's own chain of its tokens, which its tenant's salt is in.
            input_ids: The prompt.
            chunks: Where the rows of its chunks came from.
            hashes: The chain of its blocks and its answer's that were computed.
        """
        if not self.are_known(plain, input_ids):
            return
        tail = input_ids[len(plain) * self._block_size :]
        name = (settings, plain[-1], len(tail), _digest(tail))
        self._drop(name)
        self._turns[name] = _Turn(len(input_ids), chunks, tuple(hashes))
        self._names.setdefault(name[:2], []).append(name)
        self._num_hashes += len(hashes)
        while self._num_hashes > self._most_hashes:
            self._drop(next(iter(self._turns)))

    def find(
        self, settings: str, plain: Sequence[bytes], input_ids: Sequence[int], chunks: Sequence[ChunkRows]
    ) -> Former:
        """Return the chain of the longest former prompt that this one goes on from; an empty one if there is none.

        The very same prompt comes to the same chain as before, since it goes on from the same one.
        """
        if not self.are_known(plain, input_ids):
            return Former()
        for blocks in range(len(plain), 0, -1):
            names = self._names.get((settings, plain[blocks - 1]), ())
            for name in sorted(names, key=lambda name: -name[2]):
                start = blocks * self._block_size
                turn = self._turns[name]
                is_same = turn.length < len(input_ids) and _digest(input_ids[start : turn.length]) == name[3]
                if is_same and turn.chunks == tuple(chunk for chunk in chunks if chunk.start < turn.length):
                    self._turns.move_to_end(name)
                    return Former(turn.hashes, blocks)
        return Former()

    def _drop(self, name: _Name) -> None:
        turn = self._turns.pop(name, None)
        if turn is None:
            return
        self._num_hashes -= len(turn.hashes)
        self._names[name[:2]].remove(name)
        if not self._names[name[:2]]:
            del self._names[name[:2]]


def salted(request: Any, salt: str, former: Former | None = None, *, is_apart: bool = True) -> int | None:
    """Put a request's blocks on a chain of its own, behind those that it takes from a former one.

    Args:
        request: vLLM's.
        salt: What the chain is told apart by.
        former: What is taken, as far as its tokens are the request's: of a former prompt, or of the request's own chain
            before its first chunk.
        is_apart: Whether the blocks behind those are told apart, too. What vLLM computes over the former rows follows
            from the tokens alone.

    Returns:
        How many blocks it takes; `None` if its blocks cannot be told apart from others'.
    """
    hashes, update = getattr(request, "block_hashes", None), getattr(request, "update_block_hashes", None)
    if not isinstance(hashes, list) or update is None or not hasattr(request, "cache_salt"):
        return None
    former = former or Former()
    before, is_new = list(hashes), request.cache_salt != salt
    request.cache_salt = salt
    hashes[:] = former.hashes[: former.num_same]
    update()
    if not former.num_same:
        return None if is_new and before and before == hashes else 0
    # vLLM's own hasher went on from the last known block: the same tokens came to the same hashes.
    pairs = zip(hashes, former.hashes, strict=False)
    same = next((number for number, pair in enumerate(pairs) if pair[0] != pair[1]), None)
    same = min(len(hashes), len(former.hashes)) if same is None else same
    if is_apart:
        del hashes[same:]
        last = hashes[-1]
        hashes[-1] = hashlib.sha256(last + salt.encode()).digest()
        update()
        hashes[same - 1] = last
        if is_new and before[same : same + 1] and before[same : same + 1] == hashes[same : same + 1]:
            return None
    return same


def _digest(tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(",".join(map(str, tokens)).encode()).digest()
