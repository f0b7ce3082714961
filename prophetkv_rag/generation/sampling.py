"""How the next token is chosen: greedily, or sampled with transformers' own logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from prophetkv_rag.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How tokens are chosen; `temperature` 0 is greedy. `stop` may be one string.

    Raises:
        InputError: If a value is outside what is allowed.
    """

    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.max_new_tokens < 1:
            msg = f"max_new_tokens is {self.max_new_tokens}; it must be at least 1"
            raise InputError(msg)
        if self.temperature < 0:
            msg = f"temperature is {self.temperature}; it must be 0 (greedy) or more"
            raise InputError(msg)
        if not 0 < self.top_p <= 1:
            msg = f"top_p is {self.top_p}; it must be above 0 and at most 1"
            raise InputError(msg)
        if any(not stop for stop in self.stop):
            msg = "a stop string is empty; leave it out"
            raise InputError(msg)


class Sampler:
    """Chooses tokens for one answer."""

    def __init__(self, settings: SamplingSettings, device: torch.device) -> None:
        self.greedy = settings.temperature == 0
        self.warpers = LogitsProcessorList()
        if not self.greedy:
            self.warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_p < 1:
                self.warpers.append(TopPLogitsWarper(settings.top_p))
        self.generator = torch.Generator(device=device)
        if settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(settings.seed)

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> int:
        """Return the token that follows `input_ids` (`[1, n]`), of `logits` (`[1, vocab]`)."""
        if self.greedy:
            return int(logits.argmax(dim=-1))
        weights = torch.softmax(self.warpers(input_ids, logits), dim=-1)
        return int(torch.multinomial(weights, 1, generator=self.generator))
