"""What the speed bench measured, round by round, and what it tells of it: medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return `{name: median, name_min, name_max}`."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


@dataclass(slots=True)
class TtftResult:
    """One strategy at one ratio and context length; every list has an entry per round.

    Attributes:
        context_tokens: Tokens in the chunks.
        strategy: As `make_strategy` reads it.
        recompute_ratio: Fraction of the chunk tokens recomputed.
        full_flops: Full prefill's operations (`flops.py`).
        flops: This one's.
        mean_position: Where the recomputed tokens stand on average, as a fraction of the prompt; 0 if there are none.
        full_s: Full prefill's seconds.
        ram_s: Seconds with caches in RAM.
        disk_s: Seconds with every cache loaded from a warm disk (page cache), checked and decoded.
        decode_ratio: Seconds of decoding after full prefill over those after this one.
        stages_s: Where the time goes, caches in RAM; `load_disk` is loading from the warm disk instead, `load_ahead`
            what is left of that when reading begins as the collection answers the query.
    """

    context_tokens: int
    strategy: str
    recompute_ratio: float
    full_flops: float = 0.0
    flops: float = 0.0
    mean_position: float = 0.0
    full_s: list[float] = field(default_factory=list)
    ram_s: list[float] = field(default_factory=list)
    disk_s: list[float] = field(default_factory=list)
    decode_ratio: list[float] = field(default_factory=list)
    stages_s: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Medians with their spread; `speedup_...` are full prefill's seconds over ours, pair by pair.

        `limit` is how many times sooner it could be at most, by arithmetic, and `share_of_limit` what is reached of it;
        `share_of_ratio` is what is reached of the simpler limit, one over the ratio.
        """
        ratios = [full / ours for full, ours in zip(self.full_s, self.ram_s, strict=True)]
        from_disk = [full / ours for full, ours in zip(self.full_s, self.disk_s, strict=True)]
        limit = self.full_flops / self.flops
        return {
            "context_tokens": self.context_tokens,
            "strategy": self.strategy,
            "recompute_ratio": self.recompute_ratio,
            "repeats": len(ratios),
            **spread("full_prefill_s", self.full_s),
            **spread("ram_s", self.ram_s),
            **spread("disk_s", self.disk_s),
            **spread("speedup_ram", ratios),
            **spread("speedup_disk", from_disk),
            "disk_overhead": statistics.median([d / r - 1 for d, r in zip(self.disk_s, self.ram_s, strict=True)]),
            "limit": limit,
            "share_of_limit": statistics.median(ratios) / limit,
            "share_of_ratio": statistics.median(ratios) * self.recompute_ratio,
            "mean_position": self.mean_position,
            "full_flops": self.full_flops,
            "flops": self.flops,
            **spread("decode_ratio", self.decode_ratio),
            "stages_s": {name: statistics.median(stage[name] for stage in self.stages_s) for name in self.stages_s[0]},
        }


@dataclass(slots=True)
class PeerResult:
    """Another way to the first token, on the same prompt; every list has an entry per round.

    Attributes:
        context_tokens: Tokens in the chunks.
        peer: Its name.
        seconds: Its own time.
        ratios: Full prefill's seconds over its own.
        same_token: Whether its first token is full prefill's.
    """

    context_tokens: int
    peer: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    same_token: list[bool] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Medians with their spread."""
        return {
            "context_tokens": self.context_tokens,
            "peer": self.peer,
            **spread("seconds", self.seconds),
            **spread("speedup", self.ratios),
            "same_first_token": all(self.same_token),
        }


@dataclass(slots=True)
class LoadingResult:
    """Loading a prompt's caches from a warm disk, without the model; every list has an entry per round.

    Attributes:
        context_tokens: Tokens in the chunks.
        alone_s: Seconds of loading when nothing was read ahead.
        ahead_s: Seconds of loading when reading began just before the prompt was matched.
        background_s: Seconds that reading ahead takes: with that much time between the collection's answer and the
            prompt, loading costs what it costs from RAM.
    """

    context_tokens: int
    alone_s: list[float] = field(default_factory=list)
    ahead_s: list[float] = field(default_factory=list)
    background_s: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Medians with their spread."""
        return {
            "context_tokens": self.context_tokens,
            **spread("alone_s", self.alone_s),
            **spread("ahead_s", self.ahead_s),
            **spread("background_s", self.background_s),
        }
