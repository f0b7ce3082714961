"""What llama.cpp's `--cache-reuse` does to answers: keys moved to their new positions, nothing corrected.

Each prompt is compared with llama.cpp's own full prefill of the same token ids, over that one's greedy answer; ours is
compared in the same way with the model's own (`quality/fidelity.py`), on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.quality.fidelity import compare, full_prefill
from prophetkv_rag.evaluation.speed.llama_cpp import BATCH_TOKENS, GgufModel, open_llama_cpp
from prophetkv_rag.prompt import Prompt, PromptLayout

_PROMPT, _ASIDE = 0, 1  # sequences: the prompt's own, and the one that a chunk is computed in


@dataclass(frozen=True, slots=True)
class ReuseRow:
    """One way to reuse caches, against full prefill by the same program.

    Attributes:
        name: Of the way.
        recompute_ratio: Share of the chunk tokens that is computed again.
        kl: KL(full || reuse) in nats, averaged over the answers' positions and then over prompts.
        top1_agreement: Share of positions at which both would choose the same token, averaged likewise.
        prompts: How many were measured.
    """

    name: str
    recompute_ratio: float
    kl: float
    top1_agreement: float
    prompts: int


class LlamaCppCache:
    """A context of llama.cpp whose cache is moved by hand, with the calls that its server's `--cache-reuse` makes."""

    def __init__(self, llama: Any, context: Any) -> None:
        """Take a model (`llama_cpp.Llama`) and a context on it for two sequences; see `open_cache`."""
        import llama_cpp

        self._lib, self._llama, self._context = llama_cpp, llama, context
        self._memory = llama_cpp.llama_get_memory(context)
        self._vocab = llama.n_vocab()
        if not llama_cpp.llama_memory_can_shift(self._memory):
            msg = "llama.cpp cannot move this model's keys (`--cache-reuse` has no effect on it); measure another model"
            raise InputError(msg)

    def clear(self) -> None:
        """Forget everything."""
        self._lib.llama_memory_clear(self._memory, True)

    def run(self, ids: Sequence[int], start: int, *, sequence: int = _PROMPT, wanted: int = 0) -> torch.Tensor:
        """Compute rows at positions from `start` on; returns logits `[wanted, vocab]` of the last ones, float64."""
        rows = []
        for begin in range(0, len(ids), BATCH_TOKENS):
            part = ids[begin : begin + BATCH_TOKENS]
            batch = self._lib.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for index, token in enumerate(part):
                batch.token[index], batch.pos[index] = token, start + begin + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = begin + index >= len(ids) - wanted
            failed = self._lib.llama_decode(self._context, batch)
            for index in range(len(part)):
                if not failed and batch.logits[index]:
                    found = self._lib.llama_get_logits_ith(self._context, index)
                    rows.append(torch.tensor(found[: self._vocab], dtype=torch.float64))
            self._lib.llama_batch_free(batch)
            if failed:
                msg = f"llama.cpp did not decode (status {failed})"
                raise RuntimeError(msg)
        return torch.stack(rows) if rows else torch.empty(0, self._vocab, dtype=torch.float64)

    def full(self, layout: PromptLayout) -> torch.Tensor:
        """Compute a whole prompt; returns the last row's logits `[1, vocab]`."""
        self.clear()
        return self.run(layout.input_ids.tolist(), 0, wanted=1)

    def moved(self, layout: PromptLayout, opening: Sequence[int]) -> torch.Tensor:
        """Compute each chunk alone behind `opening`, move all of them into the prompt, and compute what is around them.

        It is what a prompt gets whose chunks were last seen in prompts of their own; as `full`.
        """
        self.clear()
        ids, filled = layout.input_ids.tolist(), 0
        for chunk in layout.chunks:
            self.run(ids[filled : chunk.start], filled)
            self.run([*opening, *ids[chunk.start : chunk.stop]], 0, sequence=_ASIDE)
            self._lib.llama_memory_seq_rm(self._memory, _ASIDE, 0, len(opening))
            self._move(_ASIDE, len(opening), len(opening) + chunk.stop - chunk.start, chunk.start - len(opening))
            self._lib.llama_memory_seq_cp(self._memory, _ASIDE, _PROMPT, chunk.start, chunk.stop)
            self._lib.llama_memory_seq_rm(self._memory, _ASIDE, -1, -1)
            filled = chunk.stop
        return self.run(ids[filled:], filled, wanted=1)

    def one_gone(self, layout: PromptLayout, other: Sequence[int]) -> torch.Tensor:
        """Compute a prompt with one more chunk before the first, take that out, and move the rest up; as `full`.

        It is what `--cache-reuse` is at its best in: the same chunks in the same order, but one.
        """
        self.clear()
        ids, first, last = layout.input_ids.tolist(), layout.chunks[0].start, layout.chunks[-1].stop
        self.run([*ids[:first], *other, *ids[first:last]], 0)
        self._lib.llama_memory_seq_rm(self._memory, _PROMPT, first, first + len(other))
        self._move(_PROMPT, first + len(other), last + len(other), -len(other))
        return self.run(ids[last:], last, wanted=1)

    def _move(self, sequence: int, start: int, stop: int, by: int) -> None:
        self._lib.llama_memory_seq_add(self._memory, sequence, start, stop, by)


@contextmanager
def open_cache(engine: ProphetKVEngine, gguf: GgufModel, num_tokens: int) -> Iterator[LlamaCppCache]:
    """Open llama.cpp on the engine's model, with room for `num_tokens`.

    Raises:
        InputError: If the file cannot be loaded or is another model's, or its keys cannot be moved.
    """
    llama = open_llama_cpp(engine, gguf, num_tokens=1)
    import llama_cpp

    settings = llama.context_params
    settings.n_ctx, settings.n_seq_max, settings.kv_unified = num_tokens, 2, True
    settings.n_batch = settings.n_ubatch = BATCH_TOKENS  # the binding makes them no larger than its own context
    context = llama_cpp.llama_init_from_model(llama.model, settings)
    try:
        if context is None:
            msg = f"llama.cpp has no room for {num_tokens} tokens; measure shorter prompts"
            raise InputError(msg)
        yield LlamaCppCache(llama, context)
    finally:
        if context is not None:
            llama_cpp.llama_free(context)
        llama.close()


def measure_cache_reuse(
    engine: ProphetKVEngine,
    prompts: Sequence[Prompt],
    gguf: GgufModel,
    *,
    ratios: Sequence[float],
    answer_tokens: int = 32,
    on_step: Callable[[int], None] = lambda steps: None,
) -> list[ReuseRow]:
    """Measure llama.cpp's reuse and ours on the same prompts.

    Args:
        engine: Encodes chunks alone behind its opening, which llama.cpp's are computed behind too.
        prompts: Two or more, of chunk texts.
        gguf: The engine's model for llama.cpp to read, in f32 to be compared.
        ratios: Of ours; 0 is plain reuse.
        answer_tokens: Longest answer compared, in tokens.
        on_step: Called after each prompt.

    Raises:
        InputError: As `open_cache`, and for fewer than two prompts.
    """
    if len(prompts) < 2:
        msg = "give two prompts or more: the chunk that is gone from one comes from another"
        raise InputError(msg)
    layouts = [engine.read(prompt) for prompt in prompts]
    others = [_chunk_ids(layouts[number - 1]) for number in range(len(layouts))]
    opening = list(engine.identity.prefix_ids)
    longest = max(len(layout.input_ids) + len(other) for layout, other in zip(layouts, others, strict=True))
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    room = 2 * longest + len(opening) + answer_tokens
    with open_cache(engine, gguf, room) as cache:
        for prompt, layout, other in zip(prompts, layouts, others, strict=True):
            ends, ids = engine.end_tokens, layout.input_ids.tolist()
            answer, full = _answer(cache, cache.full(layout), len(ids), ends, answer_tokens)
            for name, way in (
                ("llama.cpp, every chunk from a prompt of its own", partial(cache.moved, layout, opening)),
                ("llama.cpp, the chunk before the first gone", partial(cache.one_gone, layout, other)),
            ):
                actual = torch.cat([way(), cache.run(answer[:-1], len(ids), wanted=len(answer) - 1)])
                found.setdefault((name, 0.0), []).append(_distance(full, actual))
            truth = full_prefill(engine, prompt, answer_tokens=answer_tokens)
            engine.add_chunks(list(prompt.chunks))
            for ratio in ratios:
                strategy = "prophetkv" if ratio else "full_reuse"
                result = engine.prefill(prompt, strategy=strategy, recompute_ratio=ratio)
                fidelity = compare(engine, truth, result, score_tokens=1)
                found.setdefault((f"ours, {strategy}", ratio), []).append((fidelity.kl, fidelity.top1_agreement))
            on_step(1)
    return [
        ReuseRow(
            name,
            ratio,
            kl=sum(kl for kl, _ in rows) / len(rows),
            top1_agreement=sum(same for _, same in rows) / len(rows),
            prompts=len(rows),
        )
        for (name, ratio), rows in found.items()
    ]


def _chunk_ids(layout: PromptLayout) -> list[int]:
    first = layout.chunks[0]
    ids: list[int] = layout.input_ids[first.start : first.stop].tolist()
    return ids


def _answer(
    cache: LlamaCppCache, logits: torch.Tensor, num_tokens: int, ends: Collection[int], most: int
) -> tuple[list[int], torch.Tensor]:
    """Decode greedily; returns the answer and the logits `[answer, vocab]` that it was chosen by."""
    rows, answer = [logits], [int(logits.argmax(-1))]
    while answer[-1] not in ends and len(answer) < most:
        rows.append(cache.run(answer[-1:], num_tokens + len(answer) - 1, wanted=1))
        answer.append(int(rows[-1].argmax(-1)))
    return answer, torch.cat(rows)


def _distance(full: torch.Tensor, actual: torch.Tensor) -> tuple[float, float]:
    """Return mean KL(full || actual) and the share of rows with the same choice."""
    wanted, got = full.log_softmax(-1), actual.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - got)).sum(-1)
    return float(divergence.mean()), float((full.argmax(-1) == actual.argmax(-1)).double().mean())
