"""A chat of ten turns over a long context: tokens prefilled a turn, and the time to its first token beside turn 2's.

    python benchmarks/performance/chat_turns.py
    python benchmarks/performance/chat_turns.py --changing --model Qwen/Qwen2.5-0.5B-Instruct

The first message holds the context. With `--changing` it stands in the system message, as LlamaIndex's `context`
engines put it, and every turn retrieves another half of the passages: the history is moved behind them. Tokens are
counted, so they are the same on any machine; times are the least of `--repeats` chats. The passages are of the shipped
speeches.
"""

from __future__ import annotations

import argparse
import sys

import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine, ReuseReport
from prophetkv_rag.defaults import fetch_default_model, read_speeches

QUESTIONS = [
    "What is said of the people?",
    "And what of the nation?",
    "Who is spoken to?",
    "Is there a promise in it?",
    "What should be done next?",
    "Name one thing that is feared.",
    "Name one thing that is hoped for.",
    "How does it end?",
    "Which year is spoken of?",
    "Thank you. Say it in one sentence.",
]


def passages_of(engine: ProphetKVEngine, tokens: int, size: int) -> list[str]:
    """Return passages of about `size` tokens each that together have about `tokens`."""
    words = " ".join(read_speeches().values()).split()
    passages, used, at = [], 0, 0
    while used < tokens and at < len(words):
        passage = " ".join(words[at : at + size * 3 // 4])
        at += size * 3 // 4
        passages.append(passage)
        used += len(engine.tokenizer(passage)["input_ids"])
    return passages


def chat(engine: ProphetKVEngine, passages: list[str], *, changing: bool, answer_tokens: int) -> list[ReuseReport]:
    """Answer all questions in one chat; return the turns' reports."""
    engine.conversations.forget()
    reports, history = [], list[dict[str, str]]()
    for number, question in enumerate(QUESTIONS):
        if changing:
            half = len(passages) // 2
            chosen = [passages[(number + step) % len(passages)] for step in range(half)]
            messages = [{"role": "system", "content": "Context:\n\n" + "\n\n".join(chosen)}, *history]
            asked = question
        else:
            messages = history
            asked = question if number else "Context:\n\n" + "\n\n".join(passages) + "\n\n" + question
        said = {"role": "user", "content": asked}
        answer = engine.generate([*messages, said], max_new_tokens=answer_tokens)
        reports.append(answer.report)
        history += [said, {"role": "assistant", "content": answer.text}]
    return reports


def main() -> None:
    """Run the chats and print a line a turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Name or directory; SmolLM2-135M-Instruct by default.")
    parser.add_argument("--tokens", type=int, default=4000, help="Of the context.")
    parser.add_argument("--passage-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--changing", action="store_true", help="Other passages in the system message every turn.")
    options = parser.parse_args()
    engine = ProphetKVEngine.from_pretrained(
        options.model or fetch_default_model(),
        dtype=torch.float32,
        config=ProphetKVConfig(remember_bytes=8 << 30),
    )
    passages = passages_of(engine, options.tokens, options.passage_tokens)
    engine.add_chunks(passages)
    runs = [
        chat(engine, passages, changing=options.changing, answer_tokens=options.answer_tokens)
        for _ in range(options.repeats)
    ]
    times = [min(run[turn].timings_s.ttft for run in runs) for turn in range(len(QUESTIONS))]
    heads = ["turn", "prompt tokens", "new", "prefilled", "remembered", "moved", "TTFT s", "beside turn 2"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    before = 0
    for turn, (report, seconds) in enumerate(zip(runs[0], times, strict=True)):
        prefilled = report.fresh_tokens + report.recomputed_tokens
        lines.append(
            f"| {turn + 1} | {report.prompt_tokens:,} | {report.prompt_tokens - before:,} | {prefilled:,} "
            f"| {report.remembered_tokens:,} | {report.moved_tokens:,} | {seconds:.3f} | {seconds / times[1]:.2f} |"
        )
        before = report.prompt_tokens
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
