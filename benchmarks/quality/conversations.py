"""Conversations, turn by turn: tokens computed, and the distance to full prefill, with and without what is remembered.

    python benchmarks/quality/conversations.py --squad dev-v2.0.json --out rows.jsonl
    python benchmarks/quality/conversations.py --table benchmarks/quality/conversations/smollm2.jsonl

A conversation is about one article: the first question stands behind `--passages` of its passages, of the later ones
every third brings one more, and the client sends the whole history each time. All arms get the same history, whose
answers are full prefill's own; KL is teacher-forced over that answer, in nats a token. "again": every turn begins anew,
reusing chunks alone. "remembered": it goes on from the former turn's rows. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conversation_rows import arguments, difference, kept_rows, mean, read_articles, write_rows

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.evaluation.quality import forced_logits
from prophetkv_rag.model import cache_argument, complete_cache

ARMS = {
    "again, prophetkv 20%": ("prophetkv", 0.2, False),
    "remembered, prophetkv 20%": ("prophetkv", 0.2, True),
    "again, plain reuse": ("full_reuse", 0.0, False),
    "remembered, plain reuse": ("full_reuse", 0.0, True),
}


def conversations(file: Path, options: argparse.Namespace) -> Iterator[list[tuple[tuple[str, ...], str]]]:
    """Yield each conversation as its turns: (new passages, question)."""
    draw = random.Random(options.seed)
    for article in draw.sample(read_articles(file), options.conversations):
        paragraphs = [one for one in article["paragraphs"] if any(asked["answers"] for asked in one["qas"])]
        count = options.passages + (options.turns - 1) // 3
        chosen = draw.sample(paragraphs, count)
        passages = iter([one["context"].strip() for one in chosen])
        asked = [one["question"].strip() for paragraph in chosen for one in paragraph["qas"] if one["answers"]]
        turns = []
        for turn in range(options.turns):
            new = options.passages if turn == 0 else int(turn % 3 == 0)
            turns.append((tuple(next(passages) for _ in range(new)), draw.choice(asked)))
        yield turns


def content_of(passages: tuple[str, ...], question: str) -> str:
    """Return a user's message."""
    context = "Context:\n" + "\n\n".join(passages) + "\n\n" if passages else ""
    return f"{context}Answer in one sentence. {question}"


def keep_answer(engine: ProphetKVEngine, result: Any, answer: list[int]) -> None:
    """Keep a turn as a call that answered would: with the rows of the answer, but its last token's."""
    cache = complete_cache(result.past_key_values)
    if len(answer) > 1:
        engine.model(input_ids=torch.tensor([answer[:-1]]), **cache_argument(engine.model, cache), use_cache=True)
    engine.conversations.keep(result.answered, cache.layers, answer)


def measure(engine: ProphetKVEngine, turns: list[tuple[tuple[str, ...], str]], answer_tokens: int) -> Iterator[Any]:
    """Yield one row a turn and arm."""
    engine.add_chunks([passage for passages, _ in turns for passage in passages])
    messages: list[dict[str, str]] = []
    for number, (passages, question) in enumerate(turns):
        messages.append({"role": "user", "content": content_of(passages, question)})
        told = engine.generate(messages, strategy="full_prefill", max_new_tokens=answer_tokens, remember=False)
        answer = list(told.token_ids)
        if answer:
            truth = forced_logits(engine, engine.prefill(messages, strategy="full_prefill"), answer)
            for arm, (strategy, ratio, remembers) in ARMS.items():
                result = engine.prefill(
                    messages, strategy=strategy, recompute_ratio=ratio, remember=remembers, tenant=strategy
                )
                found = forced_logits(engine, result, answer)
                if remembers:
                    keep_answer(engine, result, answer)
                report = result.report
                yield {
                    "turn": number + 1,
                    "arm": arm,
                    "prompt": report.prompt_tokens,
                    "remembered": report.remembered_tokens,
                    "reused": report.reused_tokens,
                    "computed": report.recomputed_tokens + report.fresh_tokens,
                    "recomputed": report.recomputed_tokens,
                    "seconds": round(report.timings_s.ttft, 3),
                    "kl": float((truth.exp() * (truth - found)).sum(-1).mean()),
                    "top1": float((truth.argmax(-1) == found.argmax(-1)).double().mean()),
                }
        messages.append({"role": "assistant", "content": told.text})
    engine.conversations.forget()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table: a line a turn, then all turns behind the first, and paired differences."""
    lines = ["| turn | prompt | " + " | ".join(f"{arm}: computed, KL" for arm in ARMS) + " |"]
    lines.append("|---" * (2 + len(ARMS)) + "|")
    turns = sorted({row["turn"] for row in rows})
    for name, chosen in [*((str(turn), {turn}) for turn in turns), ("2 and later", set(turns[1:]))]:
        cells = []
        for arm in ARMS:
            found = [row for row in rows if row["arm"] == arm and row["turn"] in chosen]
            cells.append(f"{mean(found, 'computed'):,.0f}, {mean(found, 'kl'):.3f}")
        prompt = mean([row for row in rows if row["turn"] in chosen], "prompt")
        lines.append(f"| {name} | {prompt:,.0f} | " + " | ".join(cells) + " |")
    names = list(ARMS)
    for again, remembered in (names[:2], names[2:]):
        by_arm = {(row["arm"], row["conversation"], row["turn"]): row["kl"] for row in rows if row["turn"] > 1}
        pairs = [key[1:] for key in by_arm if key[0] == again and (remembered, *key[1:]) in by_arm]
        differences = [by_arm[remembered, *key] - by_arm[again, *key] for key in pairs]
        lines.append(f"\n{remembered} minus {again}, turns 2 and later: {difference(differences)}.")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Measure what is missing, and print the table."""
    parser = arguments(__doc__ or "", conversations=4, turns=10, passages=3, answer_tokens=16)
    options = parser.parse_args()
    rows = kept_rows(parser, options)
    if options.squad is not None:
        done = {row["conversation"] for row in rows[1:]}
        engine = ProphetKVEngine.from_pretrained(options.model or fetch_default_model(), dtype=torch.float32)
        for number, turns in enumerate(conversations(options.squad, options)):
            if number not in done:
                rows += [{"conversation": number, **row} for row in measure(engine, turns, options.answer_tokens)]
                write_rows(options, rows)  # whole conversations only
                sys.stderr.write(f"conversation {number + 1} of {options.conversations}\n")
    sys.stdout.write(table(rows[1:]) + "\n")


if __name__ == "__main__":
    main()
