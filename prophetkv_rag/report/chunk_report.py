"""What a report is made of: what became of each chunk, and what each stage took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ChunkStatus = Literal["hit", "miss", "corrupt", "unused"]


ChunkTier = Literal["ram", "disk", "remote", "computed", ""]


@dataclass(slots=True)
class ChunkReport:
    """One chunk of the prompt.

    `status`: `"hit"` (cache loaded), `"miss"` (none was stored: encoded now, and stored if somebody refers to the
    chunk), `"corrupt"` (a blob failed its checks: encoded again) or `"unused"` (the strategy, such as full prefill,
    needs no caches). `tier` is where the cache came from: of a hit, the store's tier that had it when the prompt asked
    (what was read ahead is in `"ram"` by then); else `"computed"`, or "" where none was needed.
    """

    key: str
    tokens: int
    status: ChunkStatus
    tier: ChunkTier = ""


@dataclass(slots=True)
class Timings:
    """Seconds on the wall clock, by stage. `ttft` is the whole prefill: from the prompt to the first token's logits.

    `suffix` is the pass over the fresh tokens where it runs on its own (nothing is selected); when tokens are
    recomputed, the fresh tokens ride in the same pass and their time is in `recompute`.
    """

    match: float = 0.0
    load: float = 0.0
    assemble: float = 0.0
    score: float = 0.0
    recompute: float = 0.0
    suffix: float = 0.0
    ttft: float = 0.0
