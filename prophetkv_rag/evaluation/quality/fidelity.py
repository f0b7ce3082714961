"""How close a reused prefill is to full prefill, on one prompt.

The main measure is the KL divergence from full prefill, teacher-forced over full prefill's own greedy answer: every
position of the answer counts, so it is far less noisy than comparing answers, and 50 prompts say something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from prophetkv_rag.config import check_recompute_ratio
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.model import RowsLayer, cache_argument, complete_cache
from prophetkv_rag.profile import parse_behind
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.reuse import PrefillResult, make_strategy


@dataclass(frozen=True, slots=True)
class Arm:
    """One thing to measure: a strategy (with its options, as `make_strategy` reads them) at a ratio.

    `strategy` may end in `@` and what the chunks were encoded behind besides the chat template's opening: the opening
    of the task's prompts (`prompt`), a lead-in, other text of the same task (`corpus`), and other chunks (`previous:2`,
    `neighbours:3`), in this order, joined by `+` (`profile.parse_behind`).
    """

    strategy: str
    recompute_ratio: float

    @property
    def spec(self) -> str:
        """What `make_strategy` reads."""
        return self.strategy.partition("@")[0]

    @property
    def encoding(self) -> str:
        """What the caches are encoded behind, as `profile.parse_behind` reads it; "" for the chat template alone."""
        return self.strategy.partition("@")[2]

    @property
    def label(self) -> str:
        """For tables and plots."""
        return self.strategy if self.recompute_ratio == 0 else f"{self.strategy} {self.recompute_ratio:.0%}"

    def check(self, *, has_encodings: bool = True) -> None:
        """Raise `InputError` for an unknown strategy, option or encoding, or a ratio outside [0, 1]."""
        make_strategy(self.spec)
        if "@" in self.strategy:
            try:
                if not has_encodings or not self.encoding:
                    msg = f"unknown encoding {self.encoding!r}" + "; allowed: none" * (not has_encodings)
                    raise InputError(msg)
                parse_behind(self.encoding)
            except InputError as error:
                msg = f"strategy {self.strategy!r}: {error}"
                raise InputError(msg) from None
        check_recompute_ratio(self.recompute_ratio)


def arms_of(strategies: Sequence[str], ratios: Sequence[float]) -> list[Arm]:
    """Return every strategy at every ratio, each once: full prefill is always measured, plain reuse has one ratio.

    Raises:
        InputError: As `Arm.check`.
    """
    arms = list(dict.fromkeys(Arm(name, ratio) for name in strategies for ratio in ratios))
    for arm in arms:
        arm.check()
    arms = [replace(arm, recompute_ratio=0.0) if arm.spec == "full_reuse" else arm for arm in arms]
    return list(dict.fromkeys(arm for arm in arms if arm.spec != "full_prefill"))


@dataclass(frozen=True, slots=True)
class Truth:
    """Full prefill of a prompt and what it leads to.

    Attributes:
        result: The prefill.
        answer: Token ids of its greedy answer, as far as it is compared.
        whole_answer: The answer as far as it is scored.
        log_probs: `[answer, vocab]`, float64: its distribution at every position of the answer.
        attention: `[N]`, fp32: the attention each chunk token gets from the suffix under full prefill, summed over the
            layers; 0 outside the chunks.
    """

    result: PrefillResult
    answer: list[int]
    whole_answer: list[int]
    log_probs: torch.Tensor
    attention: torch.Tensor


@dataclass(frozen=True, slots=True)
class Fidelity:
    """An arm's prefill against full prefill.

    Attributes:
        kl: KL(full || arm) in nats, averaged over the answer's positions, the first token's included.
        top1_agreement: Share of the answer's positions at which both would choose the same token.
        answer: Token ids of the arm's own greedy answer, as far as it is scored.
        attended_recall: Share of full prefill's most attended chunk tokens, as many as the arm recomputed, that it
            recomputed (1 minus what is crowded out); `None` if it recomputed none.
    """

    kl: float
    top1_agreement: float
    answer: list[int]
    attended_recall: float | None


@torch.no_grad()
def full_prefill(
    engine: ProphetKVEngine, prompt: Prompt, *, answer_tokens: int, score_tokens: int | None = None
) -> Truth:
    """Run full prefill and decode its greedy answer.

    Args:
        engine: Runs the model.
        prompt: The prompt.
        answer_tokens: Longest answer that other prefills are compared over, in tokens.
        score_tokens: Longest answer that is scored; `answer_tokens` by default.
    """
    result = engine.prefill(prompt, strategy="full_prefill")
    logits, answer, rows = result.logits, list[int](), []
    cache = complete_cache(result.past_key_values)
    while True:
        if len(answer) < answer_tokens:
            rows.append(torch.log_softmax(logits[0].double(), dim=-1))
        answer.append(int(logits.argmax(-1)))
        if answer[-1] in engine.end_tokens or len(answer) >= max(answer_tokens, score_tokens or 0):
            break
        step = torch.tensor([answer[-1:]], device=result.input_ids.device)
        logits = engine.model(input_ids=step, **cache_argument(engine.model, cache), use_cache=True).logits[:, -1]
    whole = answer[: score_tokens or answer_tokens]
    return Truth(result, answer[: len(rows)], whole, torch.stack(rows), _attention_of(engine, prompt, result))


def _attention_of(engine: ProphetKVEngine, prompt: Prompt, result: PrefillResult) -> torch.Tensor:
    """Score the context on full prefill's own cache, as stage I does on the stale one."""
    num_tokens = result.input_ids.shape[1]
    layers = []
    for filled in result.past_key_values.layers:
        layers.append(RowsLayer(filled.keys[:, :, :num_tokens].clone(), filled.values[:, :, :num_tokens].clone()))
    return engine.query_context(prompt, layers).attention_scores(query_scope="suffix")[:num_tokens]


@torch.no_grad()
def compare(engine: ProphetKVEngine, truth: Truth, result: PrefillResult, *, score_tokens: int) -> Fidelity:
    """Compare an arm's prefill of the same prompt with full prefill; its own answer is decoded to `score_tokens`."""
    actual = forced_logits(engine, result, truth.answer)
    divergence = (truth.log_probs.exp() * (truth.log_probs - actual)).sum(dim=-1)
    agrees = truth.log_probs.argmax(-1) == actual.argmax(-1)
    recall = None
    count = int(result.recomputed.shape[0])
    if count:
        wanted = truth.attention.topk(count).indices
        recall = float(torch.isin(wanted, result.recomputed).float().mean())
    return Fidelity(
        kl=float(divergence.mean()),
        top1_agreement=float(agrees.float().mean()),
        answer=_greedy_from(engine, result, truth.answer, agrees, actual, score_tokens),
        attended_recall=recall,
    )


def forced_logits(engine: ProphetKVEngine, result: PrefillResult, answer: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities `[answer, vocab]` of the answer's positions from another cache."""
    first = torch.log_softmax(result.logits.double(), dim=-1)
    if len(answer) == 1:
        return first
    forced = torch.tensor([list(answer[:-1])], device=result.input_ids.device)
    logits = engine.model(input_ids=forced, **cache_argument(engine.model, _fork(result)), use_cache=True).logits[0]
    return torch.cat([first, torch.log_softmax(logits.double(), dim=-1)])


def _fork(result: PrefillResult) -> object:
    """Return a cache to go on from; appending joins rows into new tensors, so the result's own stay as they are."""
    return complete_cache(result.past_key_values)


def _greedy_from(
    engine: ProphetKVEngine,
    result: PrefillResult,
    answer: list[int],
    agrees: torch.Tensor,
    log_probs: torch.Tensor,
    score_tokens: int,
) -> list[int]:
    """Return the arm's own greedy answer.

    As long as it agrees with the forced answer it is that answer, so decoding starts where they part.
    """
    if bool(agrees.all()):
        own = list(answer)
    else:
        same = int(agrees.int().argmin())
        own = [*answer[:same], int(log_probs[same].argmax())]
    cache, fed = _fork(result), 0
    while own[-1] not in engine.end_tokens and len(own) < score_tokens:
        step = torch.tensor([own[fed:]], device=result.input_ids.device)
        fed = len(own)
        argument = cache_argument(engine.model, cache)
        logits = engine.model(input_ids=step, **argument, use_cache=True, logits_to_keep=1).logits[:, -1]
        own.append(int(logits.argmax(-1)))
    return own[:score_tokens]
