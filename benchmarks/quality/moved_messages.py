"""Conversations whose retrieved context changes before the history: what moved messages cost in fidelity.

    python benchmarks/quality/moved_messages.py --squad dev-v2.0.json --out rows.jsonl
    python benchmarks/quality/moved_messages.py --table benchmarks/quality/conversations/smollm2-moved.jsonl

A conversation is about one article. Its passages stand in the system message, as LlamaIndex's `context` engines put
them; every second turn retrieves others (one of the former ones stays), so what was said moves. The turn between asks
again about the same. All arms get the same history, whose answers are full prefill's own; KL is teacher-forced over
that answer, in nats a token, over the same token ids. "anew": every turn begins anew, with chunks reused and messages
computed. "computed": it goes on from the former turn, and messages that moved are computed. "moved": they are taken
over, and the question chooses among them as among chunks. Passages are one document, so each is encoded behind those
before it; an instruction stands before the first, so the default ratio is 20%. "all moved": the latest messages too,
which are computed otherwise. A run that was interrupted goes on with what its rows lack.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from conversation_rows import arguments, difference, kept_rows, mean, read_articles, write_rows
from conversations import keep_answer

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.evaluation.quality import forced_logits
from prophetkv_rag.reuse import continuing

RATIOS = {"20%, the default here": None, "5%": 0.05}
WAYS = ("anew", "computed", "all moved", "moved")
PAIRS = (("moved", "anew"), ("moved", "computed"), ("all moved", "computed"), ("moved", "all moved"))
SYSTEM = "Answer from the context, in one sentence.\n\n"
Turn = tuple[tuple[str, ...], str]


def conversations(file: Path, options: argparse.Namespace) -> Iterator[list[Turn]]:
    """Yield each conversation as its turns: (passages retrieved, question)."""
    draw = random.Random(options.seed)
    contexts = (options.turns + 1) // 2
    for article in draw.sample(read_articles(file), options.conversations):
        paragraphs = [one for one in article["paragraphs"] if any(asked["answers"] for asked in one["qas"])]
        wanted = options.passages + (contexts - 1) * (options.passages - 1)
        chosen = [draw.choice(paragraphs) for _ in range(wanted)] if len(paragraphs) < wanted else []
        others = iter(chosen or draw.sample(paragraphs, wanted))
        retrieved = [next(others) for _ in range(options.passages)]
        turns: list[Turn] = []
        for turn in range(options.turns):
            if turn and turn % 2 == 0:  # one stays, the others go
                retrieved = [draw.choice(retrieved), *(next(others) for _ in range(options.passages - 1))]
                draw.shuffle(retrieved)
            asked = [one["question"].strip() for one in draw.choice(retrieved)["qas"] if one["answers"]]
            turns.append((tuple(dict.fromkeys(one["context"].strip() for one in retrieved)), draw.choice(asked)))
        yield turns


def prefilled(engine: ProphetKVEngine, messages: Sequence[dict[str, str]], way: str, ratio: float | None) -> Any:
    """Prefill one way."""
    tier: Any = engine.conversations
    recent = continuing.RECENT
    if way == "computed":
        tier.find_moved = lambda *_, **__: ()
    elif way == "all moved":
        continuing.RECENT = 0
    try:
        return engine.prefill(list(messages), recompute_ratio=ratio, remember=way != "anew", tenant=f"{way} {ratio}")
    finally:
        continuing.RECENT = recent
        vars(tier).pop("find_moved", None)


def measure(
    engine: ProphetKVEngine, turns: list[Turn], answer_tokens: int, arms: Sequence[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Yield one row a turn and arm, which is a ratio and a way."""
    engine.add_chunks(list(dict.fromkeys(passage for passages, _ in turns for passage in passages)))
    history: list[dict[str, str]] = []
    for number, (passages, question) in enumerate(turns):
        history.append({"role": "user", "content": question})
        messages = [{"role": "system", "content": SYSTEM + "\n\n".join(passages)}, *history]
        told = engine.generate(messages, strategy="full_prefill", max_new_tokens=answer_tokens, remember=False)
        answer = list(told.token_ids)
        if answer:
            truth = forced_logits(engine, engine.prefill(messages, strategy="full_prefill"), answer)
            for name, way in arms:
                result = prefilled(engine, messages, way, RATIOS[name])
                found = forced_logits(engine, result, answer)
                if way != "anew":
                    keep_answer(engine, result, answer)
                report = result.report
                yield {
                    "turn": number + 1,
                    "is_changed": bool(number) and number % 2 == 0,
                    "ratio": name,
                    "way": way,
                    "prompt": report.prompt_tokens,
                    "remembered": report.remembered_tokens,
                    "moved": report.moved_tokens,
                    "computed": report.recomputed_tokens + report.fresh_tokens,
                    "seconds": round(report.timings_s.ttft, 3),
                    "kl": float((truth.exp() * (truth - found)).sum(-1).mean()),
                    "top1": float((truth.argmax(-1) == found.argmax(-1)).double().mean()),
                }
        history.append({"role": "assistant", "content": told.text})
    engine.conversations.forget()


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table: turns of changed and of the same context, then paired differences."""
    heads = ["turns", "ratio", "prompt", *(f"{way}: moved, computed, KL, same top token" for way in WAYS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    kinds: dict[str, Callable[[dict[str, Any]], bool]] = {
        "the context changed": lambda row: row["is_changed"],
        "the same context": lambda row: row["turn"] > 1 and not row["is_changed"],
    }
    for ratio in RATIOS:
        for kind, is_of in kinds.items():
            chosen = [row for row in rows if row["ratio"] == ratio and is_of(row)]
            by_way = [[row for row in chosen if row["way"] == way] for way in WAYS]
            cells = [
                f"{mean(part, 'moved'):,.0f}, {mean(part, 'computed'):,.0f}, {mean(part, 'kl'):.4f}, "
                f"{mean(part, 'top1'):.1%}"
                for part in by_way
            ]
            lines.append(f"| {kind} | {ratio} | {mean(chosen, 'prompt'):,.0f} | " + " | ".join(cells) + " |")
    for ratio in RATIOS:
        for kind, is_of in kinds.items():
            kl = {
                (row["way"], row["conversation"], row["turn"]): row["kl"]
                for row in rows
                if row["ratio"] == ratio and is_of(row)
            }
            for way, other in PAIRS:
                values = [kl[way, *key[1:]] - kl[key] for key in kl if key[0] == other and (way, *key[1:]) in kl]
                lines.append(f"\n{ratio}, {kind}: {way} minus {other}: {difference(values)}.")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Measure what is missing, and print the table."""
    parser = arguments(__doc__ or "", conversations=8, turns=8, passages=4, answer_tokens=24)
    options = parser.parse_args()
    rows = kept_rows(parser, options)
    if options.squad is not None:
        done = {(row["conversation"], row["ratio"], row["way"]) for row in rows[1:]}
        config = ProphetKVConfig(encoding="previous:2", remember_bytes=4 << 30)
        engine = ProphetKVEngine.from_pretrained(
            options.model or fetch_default_model(), dtype=torch.float32, config=config
        )
        for number, turns in enumerate(conversations(options.squad, options)):
            arms = [(ratio, way) for ratio in RATIOS for way in WAYS if (number, ratio, way) not in done]
            if arms:
                found = measure(engine, turns, options.answer_tokens, arms)
                rows += [{"conversation": number, **row} for row in found]
                write_rows(options, rows)  # whole conversations only
                sys.stderr.write(f"conversation {number + 1} of {options.conversations}\n")
    sys.stdout.write(table(rows[1:]) + "\n")


if __name__ == "__main__":
    main()
