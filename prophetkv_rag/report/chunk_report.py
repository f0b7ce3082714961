"""What became of one chunk of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ChunkStatus = Literal["hit", "miss", "corrupt", "unused", "remembered"]
ChunkTier = Literal["ram", "disk", "remote", "computed", ""]


@dataclass(slots=True)
class ChunkReport:
    """One chunk of the prompt.

    `status`: `"hit"` (cache loaded), `"miss"` (none was stored: encoded now, and stored if somebody refers to the
    chunk), `"corrupt"` (a blob failed its checks: encoded again), `"unused"` (the strategy, such as full prefill, needs
    no caches) or `"remembered"` (it stands in what the prompt took over from a former one). `tier` is where the cache
    came from: of a hit, the store's tier that had it when the prompt asked (what was read ahead is in `"ram"` by then);
    else `"computed"`, or "" where none was needed. `behind` is the number of other chunks that it was encoded behind
    (`ProphetKVConfig.encoding`); 0 also where those are gone.
    """

    key: str
    tokens: int
    status: ChunkStatus
    tier: ChunkTier = ""
    behind: int = 0
