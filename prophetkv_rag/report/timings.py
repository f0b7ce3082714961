"""What each stage of a prefill took."""

from __future__ import annotations

from dataclasses import dataclass


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
