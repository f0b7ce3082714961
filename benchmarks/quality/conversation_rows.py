"""What the measurements of conversations share: SQuAD's articles, rows that are kept and gone on from, differences."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prophetkv_rag.evaluation.quality import bootstrap_mean

Row = dict[str, Any]


def read_articles(file: Path) -> list[Row]:
    """Return SQuAD's articles; gzipped or not."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as text:
        return list(json.load(text)["data"])


def arguments(
    doc: str, *, conversations: int, turns: int, passages: int, answer_tokens: int
) -> argparse.ArgumentParser:
    """Return the options of such a measurement, with these defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--squad", type=Path, help="SQuAD's JSON.")
    source.add_argument("--table", type=Path, help="Print the table of kept rows; needs no model.")
    parser.add_argument("--model", help="Directory or GGUF file; SmolLM2-135M-Instruct by default.")
    parser.add_argument("--conversations", type=int, default=conversations)
    parser.add_argument("--turns", type=int, default=turns)
    parser.add_argument("--passages", type=int, default=passages, help="Retrieved at first.")
    parser.add_argument("--answer-tokens", type=int, default=answer_tokens)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Rows are kept here.")
    return parser


def kept_rows(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Row]:
    """Return the conditions, and behind them what was measured already; ends the program if that were others."""
    kept = options.table or options.out
    rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()] if kept and kept.exists() else []
    if options.squad is None:
        return rows
    settings = {name: getattr(options, name) for name in ("turns", "passages", "answer_tokens", "seed")}
    conditions = settings | {"squad": options.squad.name, "model": Path(str(options.model or "SmolLM2")).name}
    if rows and rows[0] != conditions:
        parser.error(f"{kept} holds rows of other settings: {rows[0]}; give another --out, or those settings")
    return rows or [conditions]


def write_rows(options: argparse.Namespace, rows: Iterable[Row]) -> None:
    """Keep the rows, if that was asked for."""
    if options.out is not None:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mean(rows: Sequence[Row], name: str) -> float:
    """Return the mean of a column."""
    return sum(row[name] for row in rows) / max(1, len(rows))


def difference(values: Sequence[float]) -> str:
    """Say a paired difference in KL, with its interval."""
    change, lower = bootstrap_mean(list(values)), sum(value < 0 for value in values)
    interval = f"{change.mean:+.4f} ({change.low:+.4f} to {change.high:+.4f})"
    return f"KL {interval}, lower in {lower} of {len(values)}"
