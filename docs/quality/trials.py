"""Recipes beyond `prophetkv`, tried at the same charged budget; prints the tables that docs/quality.md quotes.

    python docs/quality/trials.py WORK --data hotpotqa.dev.jsonl.gz --data nq10.dev.jsonl.gz --rows 3 [--model DIR]

All arms run on caches of one encoding (`--encoding`, `prompt+corpus` by default) and are charged what `prophetkv` is
charged at the same ratio, its stage I included, unless an arm's name says otherwise. KL is that of `bench quality`:
teacher-forced over full prefill's own greedy answer. Every prompt's full prefill and every arm are kept in WORK, so an
interrupted run goes on, and `--report` prints the tables of what is there.

a. Two rounds: half the tokens by stage I, recomputed; the suffix (or its last 8 tokens) asks again over the fresher
   cache; then the rest. "joined": the first round's tokens ask too, with half the say.
b. The first n layers run for all chunk tokens; stage I asks over that cache; the selected tokens go on alone.
c. Stage I's layers or heads weighted. The weights (nonnegative, summing to 1) maximise the likelihood of a target under
   the weighted attention: what a token's stale values do to the question, its attention under full prefill times the
   distance of its stale value from full prefill's. They are fitted on the other tasks' prompts. "oracle" arms rank by
   the target, or by full prefill's attention, themselves: what any weighting could reach.
d. What is known after stage I, or after recomputing, against KL: rank correlation over the prompts, and the rule
   "half the prompts get r1, the others r2" against a flat ratio of the same mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trial_recipes import FirstLayersFull, Known, Peek, TwoRounds, Weighted, stage_one
from trial_tables import BASE, FLAT, RATIOS, adaptive, compared

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.attention import RowsLayer
from prophetkv_rag.default_model import fetch_default_model
from prophetkv_rag.evaluation.fidelity import Arm, _forced, full_prefill
from prophetkv_rag.evaluation.quality import Engines
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.loading import load_examples
from prophetkv_rag.evaluation.tasks.prompting import task_prompt
from prophetkv_rag.selection import Strategy, make_strategy

TASKS = ("ruler_vt", "ruler_niah_multikey_1", "ruler_niah_multiquery", "ruler_cwe")
LENGTH, CHUNK_TOKENS, ANSWER_TOKENS = 1152, 128, 24


class Trials:
    """The prompts of one model and encoding, and what was measured of them."""

    def __init__(self, work: Path, engines: Engines, encoding: str) -> None:
        """Open (or make) the folder of results."""
        self.work, self.engines, self.encoding = work, engines, encoding
        work.mkdir(parents=True, exist_ok=True)
        self.file = work / "rows.jsonl"
        self.rows: list[dict[str, Any]] = []
        if self.file.exists():
            self.rows = [json.loads(line) for line in self.file.read_text().split("\n")[:-1]]

    def kept(self, example: TaskExample) -> Path:
        """Where a prompt's full prefill and stage I are kept."""
        return self.work / f"{example.task}-{example.example_id}.npz"

    def measure(self, example: TaskExample, arms: Callable[[Any, int], dict[tuple[str, float], Any]]) -> None:
        """Run the arms that this prompt lacks; `arms(kept, number of chunk tokens)` makes them."""
        default = self.engines.default
        suffix = f"@{self.encoding}" if self.encoding else ""
        engine = self.engines.of(Arm(f"{BASE}{suffix}", 0.2), example.task)
        prompt = task_prompt(example, default.tokenizer, CHUNK_TOKENS)
        keys = engine.add_chunks(prompt.chunks)
        layout = engine.read(prompt)
        if not self.kept(example).exists():
            self._keep(example, engine, prompt, layout)
        kept = np.load(self.kept(example))
        log_probs = torch.from_numpy(kept["log_probs"]).double()
        answer = kept["answer"].tolist()
        done = {(row["arm"], row["ratio"]) for row in self.rows if (row["task"], row["id"]) == self.key(example)}
        reuse = None
        for (name, ratio), strategy in arms(kept, layout.num_chunk_tokens).items():
            if (name, ratio) in done:
                continue
            if reuse is None:
                first = engine.prefill(prompt, strategy="full_reuse")
                reuse = torch.log_softmax(first.logits[0].double(), -1)
            result = engine.prefill(prompt, strategy=strategy, recompute_ratio=ratio)
            actual = _forced(engine, result, answer)
            self._add(
                task=example.task,
                id=example.example_id,
                arm=name,
                ratio=ratio,
                charged=round(result.report.charged_ratio, 5),
                kl=float((log_probs.exp() * (log_probs - actual)).sum(-1).mean()),
                top1=float((log_probs.argmax(-1) == actual.argmax(-1)).double().mean()),
                shift=float((actual[0].exp() * (actual[0] - reuse)).sum()),
                doubt=float(-(actual[0].exp() * actual[0]).sum()),
                changed=1 - strategy.kept if isinstance(strategy, TwoRounds) else None,
            )
        engine.remove_chunks(keys)

    def key(self, example: TaskExample) -> tuple[str, str]:
        """Return what a prompt's rows are found by."""
        return example.task, example.example_id

    def _add(self, **row: Any) -> None:
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _keep(self, example: TaskExample, engine: ProphetKVEngine, prompt: Any, layout: Any) -> None:
        truth = full_prefill(self.engines.default, prompt, answer_tokens=min(ANSWER_TOKENS, example.max_new_tokens))
        full = [
            RowsLayer(one.keys[:, :, : layout.num_tokens].clone(), one.values[:, :, : layout.num_tokens].clone())
            for one in truth.result.past_key_values.layers
        ]
        peek = Peek([layer.values.clone() for layer in full])
        engine.prefill(prompt, strategy=peek, recompute_ratio=0.0)
        attended = stage_one(engine.query_context(prompt, full))
        groups = attended.shape[1] // peek.distance.shape[1]
        target = (attended * peek.distance.repeat_interleave(groups, dim=1)).sum((0, 1))
        assert torch.allclose(peek.mass.mean(1).sum(0), peek.scores, atol=1e-5), "these masses are not stage I's"
        chunks = layout.is_chunk
        np.savez(
            self.kept(example),
            log_probs=truth.log_probs.float().numpy(),
            answer=np.array(truth.answer),
            is_chunk=chunks.numpy(),
            mass=peek.mass[:, :, chunks].numpy(),
            attention=truth.attention.numpy(),
            target=torch.where(chunks, target, torch.zeros(())).numpy(),
        )


def plain_arms(num_layers: int) -> Callable[[Any, int], dict[tuple[str, float], Strategy]]:
    """Return what makes the arms of trials a, b and d, and c's oracles."""

    def arms(kept: Any, num_tokens: int) -> dict[tuple[str, float], Strategy]:
        made: dict[tuple[str, float], Strategy] = {("full_reuse", 0.0): make_strategy("full_reuse")}
        made |= {(BASE, ratio): make_strategy(BASE) for ratio in sorted({*RATIOS, *sum(FLAT.values(), ())})}
        for ratio in RATIOS:
            made |= {
                ("two rounds", ratio): TwoRounds(),
                ("two rounds, joined", ratio): TwoRounds(joined=True),
                ("two rounds, last 8 ask again, joined", ratio): TwoRounds(again=8, joined=True),
                ("two rounds, joined, second asking not charged", ratio): TwoRounds(is_free=True, joined=True),
                ("oracle: deviation x attention", ratio): Known(torch.from_numpy(kept["target"])),
                ("oracle: full prefill's attention", ratio): Known(torch.from_numpy(kept["attention"])),
            }
            for num_full in (2, round(0.15 * num_layers)):
                budget = int(ratio * num_tokens)
                if FirstLayersFull.tokens_left(budget, num_tokens, num_layers, num_full) >= 0.01 * num_tokens:
                    made[f"first {num_full} layers in full", ratio] = FirstLayersFull(num_full)
        return made

    return arms


def fit(prompts: list[tuple[np.ndarray, np.ndarray]], *, steps: int = 300) -> np.ndarray:
    """Return the weights of a mixture of attention distributions that makes the targets most likely.

    Args:
        prompts: Per prompt the masses `[K, n]` and the target `[n]`.
        steps: Of expectation maximisation; every one raises the likelihood, which has no local maxima.
    """
    weights = np.full(prompts[0][0].shape[0], 1 / prompts[0][0].shape[0])
    for _ in range(steps):
        new = np.zeros_like(weights)
        for masses, target in prompts:
            mixture = weights @ masses
            new += weights * (masses @ (target / np.maximum(mixture, 1e-12)))
        weights = new / new.sum()
    return weights


def fitted_arms(trials: Trials, examples: list[TaskExample]) -> Callable[..., Any]:
    """Return what makes the weighted arms of one task's prompts: weights fitted on all other tasks'."""
    kept = {trials.key(example): np.load(trials.kept(example)) for example in examples}
    shape = next(iter(kept.values()))["mass"].shape[:2]

    def prompts(task: str, by_head: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for (other, _), one in kept.items():
            if other != task:
                mass = one["mass"].astype(np.float64)
                target = one["target"][one["is_chunk"]].astype(np.float64)
                yield mass.reshape(-1, mass.shape[2]) if by_head else mass.mean(1), target / target.sum()

    def of_task(task: str) -> Callable[[Any, int], dict[tuple[str, float], Strategy]]:
        layers = torch.from_numpy(fit(list(prompts(task, False)))).float()
        heads = torch.from_numpy(fit(list(prompts(task, True)))).float().reshape(shape)
        weights = {
            "layers weighted": layers[:, None].expand(shape) / shape[1],
            "heads weighted": heads,
        }
        made = {(name, ratio): Weighted(one) for name, one in weights.items() for ratio in RATIOS}
        return lambda kept, num_tokens: made

    return of_task


def main() -> None:
    """Measure what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of results, one per model and encoding below it")
    parser.add_argument("--data", type=Path, action="append", default=[], help="question file; repeatable")
    parser.add_argument("--task", action="append", help=f"generated task; repeatable ({', '.join(TASKS)})")
    parser.add_argument("--rows", type=int, default=3, help="prompts per task")
    parser.add_argument("--model", help="model directory; SmolLM2-135M-Instruct by default")
    parser.add_argument("--encoding", default="prompt+corpus", help="prompt, corpus, prompt+corpus or ''")
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    given = parser.parse_args()

    model = given.model or str(fetch_default_model())
    work = given.work / f"{Path(model).name}-{given.encoding or 'plain'}"
    default = ProphetKVEngine.from_pretrained(model)
    examples, surroundings = load_examples(
        given.task or TASKS,
        given.data,
        tokenizer=default.tokenizer,
        rows=given.rows,
        length=LENGTH,
        chunk_tokens=CHUNK_TOKENS,
    )
    trials = Trials(work, Engines(default, surroundings), given.encoding)
    if not given.report:
        arms = plain_arms(len(default.support.layers))
        for number, example in enumerate(examples):
            trials.measure(example, arms)
            sys.stderr.write(f"{number + 1} of {len(examples)}: {example.task}\n")
        of_task = fitted_arms(trials, examples)
        for task in dict.fromkeys(example.task for example in examples):
            weighted = of_task(task)
            for example in examples:
                if example.task == task:
                    trials.measure(example, weighted)
    for line in [f"### {work.name}", "", *compared(trials.rows), "", *adaptive(work, trials.rows)]:
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
