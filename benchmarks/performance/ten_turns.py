"""Ten turns over 4,000 tokens of context through each chat engine, agent and chain: tokens computed, first token.

    python benchmarks/performance/ten_turns.py --out rows.jsonl
    python benchmarks/performance/ten_turns.py --table benchmarks/performance/ten_turns.jsonl

Each way (`ten_turns_ways.py`) is the framework's own class, unmodified, on one engine with its default settings; all
ask the same questions over the shipped speeches, or over `--texts`. A turn's calls of the model are added up: its
prompts' tokens, those computed and those from the turns before, and the seconds until each call's first token. Agents
say given words (held to them by a grammar), since a small model calls no tools; everything else is the model's own.
Counts are the same on any machine. A run that was interrupted goes on with the ways that its rows lack.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from ten_turns_setting import QUESTIONS, TOOL_TEMPLATE, Setting
from ten_turns_ways import WAYS

from prophetkv_rag import Grammar, ProphetKVConfig, ProphetKVEngine, ReuseReport
from prophetkv_rag.defaults import fetch_default_model, read_speeches

COLUMNS = ("prompt", "computed", "fresh", "recomputed", "remembered", "moved", "reused", "chunk")


class RecordedEngine(ProphetKVEngine):
    """Notes every call's report; says given words where there are some left in `script`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reports: list[ReuseReport] = []
        self.script: list[str] = []

    def stream(self, prompt: Any, **settings: Any) -> Generator[Any, None, None]:
        """Answer as ever."""
        if self.script:
            words = json.dumps(self.script.pop(0), ensure_ascii=False)
            settings |= {"grammar": Grammar(f"start: {words}\n"), "max_new_tokens": 400}
        for piece in super().stream(prompt, **settings):
            if piece.finish_reason is not None:
                self.reports.append(piece.report)
            yield piece


def passages_of(texts: Sequence[str], engine: ProphetKVEngine, count: int, tokens: int) -> list[str]:
    """Return as many passages of about so many tokens each."""
    words, found, at = " ".join(texts).split(), list[str](), 0
    for number in range(count):
        taken = words[at : at + tokens]
        ids = engine.tokenizer(" ".join(taken))["input_ids"]
        taken = taken[: max(1, len(taken) * tokens // max(len(ids), 1))]
        if not taken:
            sys.exit(f"the texts have {number} passages of {tokens} tokens, and {count} are wanted; give longer ones")
        found.append(" ".join(taken))
        at += len(taken)
    return found


def turn_of(reports: Sequence[ReuseReport]) -> dict[str, float]:
    """Return what one turn's calls took, together."""
    row = {name: sum(getattr(report, f"{name}_tokens") for report in reports) for name in COLUMNS if name != "computed"}
    computed = row["fresh"] + row["recomputed"]
    return row | {
        "computed": computed,
        "calls": len(reports),
        "seconds": round(sum(report.timings_s.ttft for report in reports), 3),
    }


def measure(name: str, setting: Setting) -> list[dict[str, float]]:
    """Return one way's turns."""
    turns = []
    for engine in (setting.engine, setting.tool_engine):
        engine.conversations.forget()
        engine.script.clear()
    with WAYS[name](setting) as ask:
        for question in QUESTIONS:
            setting.engine.reports.clear()
            setting.tool_engine.reports.clear()
            ask(question)
            turns.append(turn_of([*setting.engine.reports, *setting.tool_engine.reports]))
    return turns


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line for each way, in the order of the ways; the least of a way's runs where there are several."""
    heads = ("", "calls", "prompt, turn 2", "computed", "prompt, turn 10", "computed", "of these new", "first token")
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name in WAYS:
        runs = [row["turns"] for row in rows if row["way"] == name]
        if not runs:
            continue
        second, last = runs[0][1], runs[0][-1]
        seconds = [min(run[turn]["seconds"] for run in runs) for turn in (1, -1)]
        cells = [second["calls"], second["prompt"], second["computed"], last["prompt"], last["computed"], last["fresh"]]
        lines.append(
            f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + f" | {seconds[1] / seconds[0]:.2f} times |"
        )
    return "\n".join(lines)


def make_setting(options: argparse.Namespace) -> Setting:
    """Load the model, cut the passages and make the stores."""
    config = ProphetKVConfig(remember_bytes=4 << 30)
    engine = RecordedEngine.from_pretrained(options.model or fetch_default_model(), dtype=torch.float32, config=config)
    tokenizer = copy.deepcopy(engine.tokenizer)
    tokenizer.chat_template = TOOL_TEMPLATE
    tool_engine = RecordedEngine(engine.model, tokenizer, config=config)
    texts = [path.read_text("utf-8") for path in options.texts] if options.texts else list(read_speeches().values())
    k = -(-options.tokens // options.passage_tokens)
    passages = passages_of(texts, engine, 2 * k, options.passage_tokens)
    return Setting(engine, tool_engine, passages, k, options.answer_tokens)


def main() -> None:
    """Run the ways that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Name or directory; SmolLM2-135M-Instruct by default.")
    parser.add_argument("--texts", type=Path, nargs="+", help="Text files instead of the shipped speeches.")
    parser.add_argument("--tokens", type=int, default=4000, help="Of the context.")
    parser.add_argument("--passage-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", help="Ways whose name has this.")
    parser.add_argument("--out", type=Path, help="Rows are kept here.")
    parser.add_argument("--table", type=Path, help="Print the table of kept rows; needs no model.")
    options = parser.parse_args()
    kept = options.table or options.out
    rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()] if kept and kept.exists() else []
    names = [name for name in WAYS if (options.only or "") in name]
    done = {(row["way"], row["run"]) for row in rows}
    missing = [pair for pair in itertools.product(names, range(options.repeats)) if pair not in done]
    if missing and options.table is None:
        setting = make_setting(options)
        for name, run in missing:
            rows.append({"way": name, "run": run, "turns": measure(name, setting)})
            if options.out is not None:
                options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            sys.stderr.write(f"{name}\n")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
