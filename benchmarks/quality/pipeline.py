"""What chunks are encoded behind, measured through a whole pipeline: documents, a retriever, questions.

    python benchmarks/quality/pipeline.py --squad dev-v2.0.json --questions 24 --out rows.jsonl
    python benchmarks/quality/pipeline.py --data hotpotqa.jsonl --model DIR --out rows.jsonl
    python benchmarks/quality/pipeline.py --longbench DIR --task 2wikimqa --task hotpotqa --out rows.jsonl
    python benchmarks/quality/pipeline.py --table benchmarks/quality/pipeline/smollm2.jsonl

Documents are cut into chunks of `--chunk-tokens` tokens, embedded by the shipped embedder and indexed once for each
`--encoding`; each question retrieves its nearest `--top-k` chunks of the whole collection, nearest first, and is asked
with LlamaIndex's default prompt. Every arm is compared with full prefill of the same prompt: KL over its own greedy
answer, the F1 of both answers, and the budget really charged. With `--out` an interrupted run goes on where it stopped.
`control:shuffled` and `control:random` are `neighbours:3` with the neighbours' order turned round, and with chunks
drawn at random instead of them; `control:tokens` takes the nearest by tf-idf over tokens instead of by embeddings. An
encoding may name a strategy of its own: `previous:2/prophetkv:context_share=0.5`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from llama_index.core.node_parser import SentenceSplitter

from prophetkv_rag import Prompt, ProphetKVEngine
from prophetkv_rag.defaults import MiniLMEmbedder, fetch_default_model
from prophetkv_rag.evaluation.quality import PAPER as PAPER_CONFIG
from prophetkv_rag.evaluation.quality import bootstrap_mean, full_prefill
from prophetkv_rag.evaluation.quality.fidelity import compare
from prophetkv_rag.evaluation.quality.metrics import METRICS
from prophetkv_rag.evaluation.tasks.prompting import user_turn
from prophetkv_rag.evaluation.tasks.questions import read_questions
from prophetkv_rag.model import load_model

BEFORE = "Context information is below.\n---------------------\n"
AFTER = (
    "\n---------------------\nGiven the context information and not prior knowledge, answer the query.\n"
    "Query: {question}\nAnswer: "
)
ENCODINGS = ("opening", "lead-in", "previous:2", "neighbours:3")
PAPER = ("opening", 0.2)
"""What the paper's recipe comes to here: chunks behind the opening, 20% recomputed."""


@dataclass(frozen=True)
class Collection:
    """Chunks in order, the document of each, and their embeddings and tf-idf vectors, of length 1."""

    chunks: list[str]
    document_of: list[int]
    embeddings: torch.Tensor
    by_tokens: torch.Tensor


@dataclass(frozen=True)
class Asked:
    """A question and the answers that are right."""

    name: str
    question: str
    answers: tuple[str, ...]


def documents_and_questions(options: argparse.Namespace) -> tuple[list[str], list[Asked]]:
    """Return the texts to index, and what to ask."""
    if options.longbench is not None:
        files = [options.longbench / f"{task}.jsonl" for task in options.task]
        lines = [(file.stem, json.loads(line)) for file in files for line in file.open(encoding="utf-8")]
        found = [
            Asked(f"{task}:{row['_id']}", row["input"], tuple(row["answers"]))
            for task, row in lines
            if len(row["context"]) <= options.longest
        ]
        texts = [row["context"] for _, row in lines if len(row["context"]) <= options.longest]
        return texts, found[: options.questions]
    if options.squad is not None:
        opened = gzip.open if options.squad.suffix == ".gz" else open
        with opened(options.squad, "rt", encoding="utf-8") as file:
            articles = json.load(file)["data"][: options.documents]
        texts = ["\n\n".join(one["context"] for one in article["paragraphs"]) for article in articles]
        asked = [
            Asked(answer["id"], answer["question"], tuple(one["text"] for one in answer["answers"]))
            for article in articles
            for paragraph in article["paragraphs"]
            for answer in paragraph["qas"]
            if answer["answers"]
        ]
        return texts, random.Random(options.seed).sample(asked, options.questions)
    rows = read_questions(options.data, limit=options.rows)
    texts = list(dict.fromkeys(passage for row in rows for passage in row.passages))
    return texts, [Asked(row.id, row.question, row.answers) for row in rows[: options.questions]]


def collect(texts: Sequence[str], embedder: MiniLMEmbedder, tokenizer: Any, chunk_tokens: int) -> Collection:
    """Cut the documents into chunks and embed these."""
    splitter = SentenceSplitter(
        chunk_size=chunk_tokens,
        chunk_overlap=0,
        tokenizer=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
    )
    cut = [(chunk, number) for number, text in enumerate(texts) for chunk in splitter.split_text(text)]
    chunks = list(dict.fromkeys(chunk for chunk, _ in cut))
    of_chunk = dict(reversed(cut))
    embeddings = torch.tensor(embedder.embed(chunks))
    return Collection(chunks, [of_chunk[chunk] for chunk in chunks], embeddings, tf_idf(chunks, tokenizer))


def tf_idf(chunks: Sequence[str], tokenizer: Any) -> torch.Tensor:
    """Return a row of length 1 for each chunk: how often each token stands in it, by how rare that is elsewhere."""
    counts = torch.zeros(len(chunks), len(tokenizer))
    for row, chunk in zip(counts, chunks, strict=True):
        ids = torch.tensor(tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"])
        row += torch.bincount(ids, minlength=counts.shape[1])
    weighted = counts * (len(chunks) / (counts > 0).sum(0).clamp(min=1)).log()
    return torch.nn.functional.normalize(weighted, dim=1)


def before_each(collection: Collection, encoding: str, seed: int) -> list[list[str]]:
    """Return the texts that each chunk stands behind."""
    kind, _, number = encoding.partition(":")
    chunks, documents = collection.chunks, collection.document_of
    if kind == "previous":
        return [
            [chunks[one] for one in range(max(0, n - int(number)), n) if documents[one] == documents[n]]
            for n in range(len(chunks))
        ]
    draw = random.Random(seed)
    vectors = collection.by_tokens if encoding == "control:tokens" else collection.embeddings
    likeness = vectors @ vectors.T
    likeness.fill_diagonal_(-2)
    count = 3 if kind == "control" else int(number)
    nearest = [[chunks[one] for one in row] for row in likeness.topk(count).indices.flip(1).tolist()]
    if encoding == "control:shuffled":
        return [row[::-1] for row in nearest]
    if encoding == "control:random":
        return [draw.sample([one for one in chunks if one != chunk], count) for chunk in chunks]
    return nearest


def engine_of(default: ProphetKVEngine, encoding: str, opening: str, lead_in: str) -> ProphetKVEngine:
    """Return an engine on the same model whose chunks are encoded so; `lead-in+previous:2` is both."""
    parts = encoding.split("+")
    counted = [part for part in parts if ":" in part]
    name = "neighbours:3" if counted and counted[0].startswith("control") else (counted or ["plain"])[0]
    config = replace(
        default.config,
        prompt_template=f"{opening}{{context}}",
        lead_in=lead_in if "lead-in" in parts else None,
        encoding=name,
    )
    return ProphetKVEngine(default.model, default.tokenizer, config=config)


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--squad", type=Path, help="SQuAD's JSON: its articles are indexed whole.")
    source.add_argument("--table", type=Path, help="Print the tables of kept rows; needs no model.")
    source.add_argument("--data", type=Path, help="JSON lines of questions with passages: these are indexed.")
    source.add_argument("--longbench", type=Path, help="Folder of LongBench's files: contexts are indexed whole.")
    parser.add_argument("--task", action="append", default=[], help="Of --longbench; repeatable.")
    parser.add_argument("--longest", type=int, default=80_000, help="Longest context of --longbench, in characters.")
    parser.add_argument("--model", help="Model directory; SmolLM2-135M-Instruct by default.")
    parser.add_argument("--documents", type=int, default=16, help="Articles of --squad.")
    parser.add_argument("--rows", type=int, default=40, help="Rows of --data whose passages are indexed.")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--answer-tokens", type=int, default=24)
    parser.add_argument("--encoding", action="append", help=f"Repeatable; by default {', '.join(ENCODINGS)}.")
    parser.add_argument("--ratio", type=float, action="append", help="Repeatable; by default 0, 0.05, 0.1, 0.2.")
    parser.add_argument("--strategy", default="prophetkv")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar="ENCODING", help="Compare two.")
    parser.add_argument("--out", type=Path, help="Rows are kept here.")
    options = parser.parse_args()
    if options.table is not None:
        _print_kept(options.table, options.pair)
        return
    encodings, ratios = options.encoding or list(ENCODINGS), options.ratio or [0.0, 0.05, 0.1, 0.2]

    model, tokenizer = load_model(str(options.model or fetch_default_model()))
    default = ProphetKVEngine(model, tokenizer, config=replace(PAPER_CONFIG, strategy=options.strategy))
    texts, questions = documents_and_questions(options)
    embedder = MiniLMEmbedder()
    collection = collect(texts, embedder, tokenizer, options.chunk_tokens)
    asked = torch.tensor(embedder.embed([one.question for one in questions]))
    found = (asked @ collection.embeddings.T).topk(options.top_k).indices.tolist()
    needed = {collection.chunks[one] for row in found for one in row}
    lead_in = next(chunk for chunk in collection.chunks if chunk not in needed)
    opening, _ = user_turn(tokenizer, BEFORE, AFTER)

    settings = {
        "source": "+".join(options.task) or (options.squad or options.data).name,
        "model": Path(str(options.model or "SmolLM2-135M-Instruct")).name,
        **{name: getattr(options, name) for name in ("chunk_tokens", "top_k", "answer_tokens", "strategy", "seed")},
        "chunks": len(collection.chunks),
        "asked": len(questions),  # the lead-in is a chunk that none of them retrieves
    }
    rows = _kept(options.out, settings)
    engines: dict[str, ProphetKVEngine] = {}
    for encoding in encodings:
        if all((encoding, ratio, one.name) in rows for ratio in ratios for one in questions):
            continue
        encoding = encoding.partition("/")[0]  # one engine for all its strategies
        if encoding in engines:
            continue
        engine = engines[encoding] = engine_of(default, encoding, opening, lead_in)
        started = time.perf_counter()
        is_plain = engine.config.encoding == "plain"
        behind = None if is_plain else before_each(collection, encoding.split("+")[-1], options.seed)
        if engine.config.encoding.startswith("neighbours"):  # as in a collection: alone first
            engine.add_chunks(collection.chunks)
        engine.add_chunks(collection.chunks, behind=behind)
        sys.stderr.write(f"{encoding}: {len(collection.chunks)} chunks in {time.perf_counter() - started:.1f} s\n")

    names = [one.name for one in questions]
    for row, one in zip(found, questions, strict=True):
        missing = [(e, r) for e in encodings for r in ratios if (e, r, one.name) not in rows]
        if not missing:
            continue
        head, tail = user_turn(tokenizer, BEFORE, AFTER.format(question=one.question))
        prompt = Prompt(head, [collection.chunks[number] for number in row], tail, query=one.question, glue="\n\n")
        truth = full_prefill(default, prompt, answer_tokens=options.answer_tokens)

        def score(answer: Sequence[int], right: Sequence[str] = one.answers) -> float:
            return METRICS["qa_f1"](tokenizer.decode(answer, skip_special_tokens=True), right)

        def keep(key: tuple[str, float, str], *measured: float) -> None:
            rows[key] = measured
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([*key, *measured]) + "\n")

        keep((FULL, 1.0, one.name), 0.0, 1.0, score(truth.whole_answer), 1.0)
        for encoding, ratio in missing:
            name, _, strategy = encoding.partition("/")
            result = engines[name].prefill(prompt, strategy=strategy or None, recompute_ratio=ratio)
            fidelity = compare(default, truth, result, score_tokens=options.answer_tokens)
            charged = round(result.report.charged_ratio, 5)
            keep((encoding, ratio, one.name), fidelity.kl, fidelity.top1_agreement, score(fidelity.answer), charged)
        sys.stderr.write(f"{one.name}: {result.report.prompt_tokens} tokens\n")
    _print(rows, settings, encodings, ratios, names)
    _print_pairs(rows, options.pair, ratios, names)


FULL = "full prefill"
Rows = dict[tuple[str, float, str], tuple[float, ...]]
"""(encoding, ratio, question) -> KL, agreement and, in newer files, the answer's F1 and the budget charged."""


def _kept(out: Path | None, settings: dict[str, Any]) -> Rows:
    if out is None or not out.exists():
        if out is not None:
            out.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return {}
    first, *lines = out.read_text(encoding="utf-8").splitlines()
    if json.loads(first) != settings:
        sys.exit(f"error: {out} holds rows of other settings: {first}; give another --out")
    kept = [json.loads(line) for line in lines]
    return {(encoding, ratio, name): tuple(measured) for encoding, ratio, name, *measured in kept}


def _print_kept(path: Path, pairs: Sequence[Sequence[str]]) -> None:
    settings = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    rows = _kept(path, settings)
    measured = [key for key in rows if key[0] != FULL]
    if not measured:
        sys.exit(f"error: {path} holds no rows yet")
    encodings, ratios, names = (list(dict.fromkeys(part)) for part in zip(*measured, strict=True))
    arms = {(encoding, ratio) for encoding, ratio, _ in measured}
    names = [name for name in names if all((*arm, name) in rows for arm in arms)]
    _print(rows, settings, encodings, sorted(ratios), names)
    _print_pairs(rows, pairs, sorted(ratios), names)


def _print(
    rows: Rows, settings: dict[str, Any], encodings: Sequence[str], ratios: Sequence[float], names: Sequence[str]
) -> None:
    write = sys.stdout.write
    write(", ".join(f"{key} {value}" for key, value in settings.items()) + f", {len(names)} questions\n\n")
    write("| chunks encoded behind | " + " | ".join(f"{100 * ratio:.3g}%" for ratio in ratios) + " |\n")
    write("|---|" + "---|" * len(ratios) + "\n")
    by_arm: dict[tuple[str, float], list[tuple[float, ...]]] = defaultdict(list)
    for encoding in encodings:
        for ratio in ratios:
            if all((encoding, ratio, name) in rows for name in names):
                by_arm[encoding, ratio] = [rows[encoding, ratio, name] for name in names]
        cells = [_cell(by_arm[encoding, ratio]) if (encoding, ratio) in by_arm else "-" for ratio in ratios]
        write(f"| {encoding} | " + " | ".join(cells) + " |\n")
    write("\nMean KL in nats (share of the answer's tokens that stay the same; F1 of the answers; budget charged).")
    if all((FULL, 1.0, name) in rows for name in names):
        write(f" Full prefill's F1: {100 * sum(rows[FULL, 1.0, name][2] for name in names) / len(names):.1f}.")
    write("\n")
    if PAPER not in by_arm:
        return
    write(f"Paired with {PAPER[0]} at {PAPER[1]:.0%}, 95% bootstrap:\n")
    for (encoding, ratio), arm in by_arm.items():
        if (encoding, ratio) != PAPER:
            write(f"  {encoding:14} {100 * ratio:4.3g}%  {_compared(arm, by_arm[PAPER])}\n")


def _cell(arm: Sequence[tuple[float, ...]]) -> str:
    kl, same, *newer = (sum(column) / len(arm) for column in zip(*arm, strict=False))
    more = [f"; {100 * value:.1f}" for value in newer[:1]] + [f"; {value:.1%}" for value in newer[1:]]
    return f"{kl:.3f} ({same:.0%}{''.join(more)})"


def _print_pairs(rows: Rows, pairs: Sequence[Sequence[str]], ratios: Sequence[float], names: Sequence[str]) -> None:
    for one, other in pairs:
        both = [ratio for ratio in ratios if all((arm, ratio, name) in rows for arm in (one, other) for name in names)]
        for ratio in both:
            arms = [[rows[encoding, ratio, name] for name in names] for encoding in (one, other)]
            sys.stdout.write(f"{one} against {other} at {ratio:.0%}: {_compared(*arms)}\n")


def _compared(arm: Sequence[tuple[float, ...]], base: Sequence[tuple[float, ...]]) -> str:
    differences = [mine[0] - other[0] for mine, other in zip(arm, base, strict=True)]
    mean = bootstrap_mean(differences)
    lower = sum(difference < 0 for difference in differences)
    return f"{mean.mean:+.3f} ({mean.low:+.3f} to {mean.high:+.3f}), lower on {lower} of {len(differences)}"


if __name__ == "__main__":
    main()
