"""Prints the tables of measured rows, pooled and per task, without a model: what the `.md` beside each rows file holds.

    python benchmarks/quality/tables.py smollm2            # one of the files here, by name
    python benchmarks/quality/tables.py smollm2 --every-arm
    python benchmarks/quality/tables.py rows.jsonl         # a file of your own from `bench quality --out`

Only arms that were measured on all prompts are compared; with `--every-arm` all arms are, on the prompts that have them
all, which may be few.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from pathlib import Path

from prophetkv_rag.evaluation.quality import ResultsFile, markdown, summarise

KEPT = {path.name.partition(".")[0]: path for path in sorted(Path(__file__).parent.glob("*.jsonl.gz"))}


def tables(file: Path, *, every_arm: bool) -> str:
    """Return the tables of a rows file, packed or not."""
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    conditions = json.loads(text.partition("\n")[0])["conditions"]
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / "rows.jsonl"
        unpacked.write_text(text, "utf-8")
        rows = ResultsFile(unpacked, conditions).rows
    arms_of: dict[tuple[str, str], set[tuple[str, float]]] = {}
    for row in rows:
        arms_of.setdefault((row.task, row.example_id), set()).add((row.strategy, row.recompute_ratio))
    arms = set.union(*arms_of.values()) if every_arm else set.intersection(*arms_of.values())
    prompts = {prompt for prompt, measured in arms_of.items() if measured >= arms}
    kept = [
        row for row in rows if (row.strategy, row.recompute_ratio) in arms and (row.task, row.example_id) in prompts
    ]
    return markdown(summarise(kept), conditions)


def main() -> None:
    """Print the tables of the files that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help=f"a file, or one of: {', '.join(KEPT)}")
    parser.add_argument("--every-arm", action="store_true", help="also arms that some prompts lack")
    given = parser.parse_args()
    for name in given.rows:
        file = KEPT.get(name, Path(name))
        if not file.is_file():
            parser.error(f"there is no file {file}; here are {', '.join(KEPT)}")
        sys.stdout.write(tables(file, every_arm=given.every_arm) + "\n")


if __name__ == "__main__":
    main()
