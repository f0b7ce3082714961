"""Recipes beyond `prophetkv`, tried at the same charged budget; prints the tables that trials.md quotes.

    python benchmarks/quality/trials.py WORK --data hotpotqa.dev.jsonl.gz --data nq10.dev.jsonl.gz [--model DIR]
    python benchmarks/quality/trials.py WORK --data ... --known benchmarks/quality/smollm2.jsonl.gz  # trial d

All arms run on caches of one encoding (`--encoding`, `prompt+corpus` by default) and are charged what `prophetkv` is
charged at the same ratio, its stage I included, unless an arm's name says otherwise. KL is that of `bench quality`:
teacher-forced over full prefill's own greedy answer. Every prompt's full prefill and every arm are kept in WORK, so an
interrupted run goes on; trial_tables.py prints the tables of what is there (what trials.md quotes is kept in trials/).

a. Two rounds: half the tokens by stage I, recomputed; the suffix (or its last 8 tokens) asks again over the fresher
   cache; then the rest. "joined": the first round's tokens ask too, with half the say.
b. The first n layers run for all chunk tokens; stage I asks over that cache; the selected tokens go on alone.
c. Stage I's layers or heads weighted. The weights (nonnegative, summing to 1) maximise the likelihood of a target under
   the weighted attention: what a token's stale values do to the question, its attention under full prefill times the
   distance of its stale value from full prefill's. They are fitted on the other tasks' prompts. "oracle" arms rank by
   the target, or by full prefill's attention, themselves.
e. Every pick brings its neighbours along.
f. Stage I's scores times the deviation of the values at layer 1.
g. The question attends to a digest of the context: the means of 2, 4 or 8 keys and values.
d. What is known before the answer (stage I's scores; the next token's distribution under plain reuse, and how far 10%
   move it) against the KL of a finished `bench quality` run on the same prompts: rank correlations, and the rule
   "the calmer half of the prompts gets 0%, the other 20%" against a flat 10%.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trial_digest import Digest
from trial_recipes import FirstLayersFull, Known, Peek, Spans, TimesDeviation, TwoRounds, Weighted, fit, stage_one
from trial_tables import BASE, RATIOS, adaptive, compared, read_lines

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.evaluation.quality import PAPER, Arm, Engines, forced_logits, full_prefill
from prophetkv_rag.evaluation.tasks import TaskExample, load_examples, task_prompt
from prophetkv_rag.model import RowsLayer
from prophetkv_rag.prompt import Prompt
from prophetkv_rag.reuse import Strategy, make_strategy

TASKS = ("ruler_vt", "ruler_niah_multikey_1", "ruler_niah_multiquery", "ruler_cwe")
ALL_TASKS = (*TASKS, "ruler_niah_single_2", "ruler_niah_multivalue")
LENGTH, CHUNK_TOKENS, ANSWER_TOKENS = 1152, 128, 24

Arms = Callable[[Any, int], dict[tuple[str, float], Strategy]]
"""Makes a prompt's arms, by name and ratio, from what is kept of it and its number of chunk tokens."""


class Trials:
    """The prompts of one model and encoding, and what was measured of them."""

    def __init__(self, work: Path, engines: Engines, encoding: str, wanted: Sequence[str] = ("",)) -> None:
        """Open (or make) the folder of results; only arms whose names hold one of `wanted` are measured."""
        self.work, self.engines, self.encoding, self.wanted = work, engines, encoding, (BASE, *wanted)
        work.mkdir(parents=True, exist_ok=True)
        self.file = work / "rows.jsonl"
        self.rows = read_lines(self.file)

    def kept(self, example: TaskExample) -> Path:
        """Where a prompt's full prefill and stage I are kept."""
        return self.work / f"{example.task}-{example.example_id}.npz"

    @torch.no_grad()
    def measure(self, example: TaskExample, arms: Arms) -> None:
        """Run the arms that this prompt lacks."""
        if self.kept(example).exists() and not self._missing(example, arms):
            return
        engine, prompt, keys = self.encoded(example)
        if not self.kept(example).exists():
            self._keep(example, engine, prompt, engine.read(prompt))
        kept = np.load(self.kept(example))
        log_probs = torch.from_numpy(kept["log_probs"]).double()
        answer = kept["answer"].tolist()
        for (name, ratio), strategy in self._missing(example, arms).items():
            result = engine.prefill(prompt, strategy=strategy, recompute_ratio=ratio)
            actual = forced_logits(engine, result, answer)
            self._add(
                task=example.task,
                id=example.example_id,
                arm=name,
                ratio=ratio,
                charged=round(result.report.charged_ratio, 5),
                kl=float((log_probs.exp() * (log_probs - actual)).sum(-1).mean()),
                top1=float((log_probs.argmax(-1) == actual.argmax(-1)).double().mean()),
            )
        engine.remove_chunks(keys)

    def _missing(self, example: TaskExample, arms: Arms) -> dict[Any, Any]:
        done = {(row["arm"], row["ratio"]) for row in self.rows if (row["task"], row["id"]) == self.key(example)}
        kept = np.load(self.kept(example))
        made = arms(kept, int(kept["is_chunk"].sum()))
        return {
            arm: one for arm, one in made.items() if arm not in done and any(part in arm[0] for part in self.wanted)
        }

    def encoded(self, example: TaskExample) -> tuple[ProphetKVEngine, Prompt, list[str]]:
        """Encode a prompt's chunks; returns the engine that holds them, the prompt and their keys."""
        suffix = f"@{self.encoding}" if self.encoding else ""
        engine = self.engines.of(Arm(f"{BASE}{suffix}", 0.2), example.task)
        prompt = task_prompt(example, engine.tokenizer, CHUNK_TOKENS)
        return engine, prompt, engine.add_chunks(prompt.chunks)

    def look(self, example: TaskExample) -> dict[str, float]:
        """Return what is known of a prompt before its answer."""
        engine, prompt, keys = self.encoded(example)
        heads = engine.model.config.get_text_config(decoder=True).num_attention_heads
        asked = Weighted(torch.full((len(engine.support.layers), heads), 1 / heads))
        some = torch.log_softmax(engine.prefill(prompt, strategy=asked, recompute_ratio=0.1).logits[0].double(), -1)
        none = torch.log_softmax(engine.prefill(prompt, strategy="full_reuse").logits[0].double(), -1)
        layout = engine.read(prompt)
        engine.remove_chunks(keys)
        per_layer = asked.mass.mean(1)[:, layout.is_chunk].double().numpy()
        scores = per_layer.mean(0)
        order, tenth = np.sort(scores)[::-1], len(scores) // 10
        best = set(np.argsort(-scores)[:tenth])
        return {
            "entropy of the scores": float(-(scores * np.log(scores + 1e-12)).sum()),
            "mass outside the top 10%": float(1 - order[:tenth].sum()),
            "mass outside the top 20%": float(1 - order[: 2 * tenth].sum()),
            "layers' picks outside the sum's": float(
                1 - np.mean([len(set(np.argsort(-one)[:tenth]) & best) / tenth for one in per_layer])
            ),
            "next token's entropy, plain reuse": float(-(none.exp() * none).sum()),
            "next token's entropy, 10%": float(-(some.exp() * some).sum()),
            "next token's shift (KL), plain reuse to 10%": float((some.exp() * (some - none)).sum()),
            "question's share of the rows": 1 - layout.suffix_start / layout.num_tokens,
        }

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


def plain_arms(num_layers: int) -> Arms:
    """Return what makes the arms of trials a, b and d, and c's oracles."""

    def arms(kept: Any, num_tokens: int) -> dict[tuple[str, float], Strategy]:
        made: dict[tuple[str, float], Strategy] = {("full_reuse", 0.0): make_strategy("full_reuse")}
        made |= {(BASE, ratio): make_strategy(BASE) for ratio in RATIOS}
        for ratio in RATIOS:
            made |= {
                ("two rounds", ratio): TwoRounds(),
                ("two rounds, joined", ratio): TwoRounds(joined=True),
                ("two rounds, last 8 ask again, joined", ratio): TwoRounds(again=8, joined=True),
                ("two rounds, joined, second asking not charged", ratio): TwoRounds(is_free=True, joined=True),
                ("each pick with 1 neighbour on both sides", ratio): Spans(1),
                ("each pick with 2 neighbours on both sides", ratio): Spans(2),
                **{(f"digest: means of {block}", ratio): Digest(block) for block in (1, 2, 4, 8)},
                ("attention x layer-1 deviation, its two layers not charged", ratio): TimesDeviation(is_free=True),
                ("oracle: deviation x attention", ratio): Known(torch.from_numpy(kept["target"])),
                ("oracle: full prefill's attention", ratio): Known(torch.from_numpy(kept["attention"])),
            }
            for num_full in (2, round(0.15 * num_layers)):
                budget = int(ratio * num_tokens)
                if FirstLayersFull.tokens_left(budget, num_tokens, num_layers, num_full) >= 0.01 * num_tokens:
                    made[f"first {num_full} layers in full", ratio] = FirstLayersFull(num_full)
                    if num_full == 2:
                        made["attention x layer-1 deviation", ratio] = TimesDeviation()
        return made

    return arms


def fitted_arms(trials: Trials, examples: list[TaskExample], task: str) -> Arms:
    """Return what makes the weighted arms of one task's prompts: weights fitted on all other tasks'."""
    layers, heads = [], []
    for example in examples:
        if example.task != task:
            kept = np.load(trials.kept(example))
            mass, target = kept["mass"].astype(np.float64), kept["target"][kept["is_chunk"]].astype(np.float64)
            layers.append((mass.mean(1), target / target.sum()))
            heads.append((mass.reshape(-1, mass.shape[2]), target / target.sum()))
    shape = mass.shape[:2]
    half = (torch.arange(shape[0]) >= shape[0] // 2).float()
    weights = {
        "layers weighted": torch.from_numpy(fit(layers)).float()[:, None].expand(shape) / shape[1],
        "heads weighted": torch.from_numpy(fit(heads)).float().reshape(shape),
        "layers of the second half only": half[:, None].expand(shape) / shape[1],
    }
    made: dict[tuple[str, float], Strategy] = {
        (name, ratio): Weighted(one) for name, one in weights.items() for ratio in RATIOS
    }
    return lambda kept, num_tokens: made


def main() -> None:
    """Measure what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of results, one per model and encoding below it")
    parser.add_argument("--data", type=Path, action="append", default=[], help="question file; repeatable")
    parser.add_argument("--task", action="append", help=f"generated task; repeatable ({', '.join(TASKS)})")
    parser.add_argument("--rows", type=int, default=12, help="prompts per task to choose from")
    parser.add_argument("--prompts", type=int, default=12, help="how many to measure, of all tasks by turns")
    parser.add_argument("--arm", action="append", help="only arms whose names hold this, and prophetkv; repeatable")
    parser.add_argument("--model", help="model directory; SmolLM2-135M-Instruct by default")
    parser.add_argument("--encoding", default="prompt+corpus", help="prompt, corpus, prompt+corpus or ''")
    parser.add_argument("--known", type=Path, help="rows of a bench quality run (.jsonl.gz): trial d instead")
    given = parser.parse_args()

    model = given.model or str(fetch_default_model())
    work = given.work / f"{Path(model).name}-{given.encoding or 'plain'}"
    default = ProphetKVEngine.from_pretrained(model, config=PAPER)
    examples, surroundings = load_examples(
        given.task or (ALL_TASKS if given.known else TASKS),
        given.data,
        tokenizer=default.tokenizer,
        rows=given.rows,
        length=LENGTH,
        chunk_tokens=CHUNK_TOKENS,
    )
    trials = Trials(work, Engines(default, surroundings), given.encoding, given.arm or ("",))
    if given.known:
        lines = look_at_all(trials, examples, given.known, given.prompts)
    else:
        measure_all(trials, examples[: given.prompts])
        lines = compared(trials.rows)
    for line in [f"### {work.name}", "", *lines]:
        sys.stdout.write(line + "\n")


def measure_all(trials: Trials, examples: list[TaskExample]) -> None:
    """Measure trials a and b, then c, whose weights need all prompts' stage I."""
    arms = plain_arms(len(trials.engines.default.support.layers))
    for number, example in enumerate(examples):
        trials.measure(example, arms)
        sys.stderr.write(f"{number + 1} of {len(examples)}: {example.task}\n")
    tasks = dict.fromkeys(example.task for example in examples)
    for task in tasks if len(tasks) > 1 else ():
        weighted = fitted_arms(trials, examples, task)
        for example in examples:
            if example.task == task:
                trials.measure(example, weighted)


def look_at_all(trials: Trials, examples: list[TaskExample], known: Path, prompts: int) -> Iterator[str]:
    """Look at the prompts that a bench run knows the KL of, as far as not done before; yields the table."""
    kl: dict[tuple[str, str], dict[float, float]] = {}
    for line in gzip.decompress(known.read_bytes()).decode().splitlines()[1:]:
        row = json.loads(line)
        if row["strategy"] in (f"full_reuse@{trials.encoding}", f"{BASE}@{trials.encoding}"):
            kl.setdefault((row["task"], row["example_id"]), {})[row["recompute_ratio"]] = row["kl"]
    file = trials.work / "looks.jsonl"
    looks = read_lines(file)
    done = {(look["task"], look["id"]) for look in looks}
    wanted = [one for one in examples if len(kl.get(trials.key(one), {})) == 3]
    for number, example in enumerate(wanted[:prompts]):
        task, name = trials.key(example)
        if (task, name) not in done:
            known_of_it = {f"{ratio:.0%}": value for ratio, value in sorted(kl[task, name].items())}
            looks.append({"task": task, "id": name, "looks": trials.look(example), "kl": known_of_it})
            with file.open("a") as out:
                out.write(json.dumps(looks[-1]) + "\n")
            sys.stderr.write(f"{number + 1} of {prompts}: {example.task}\n")
    yield from adaptive(looks)


if __name__ == "__main__":
    main()
