"""vLLM alone (prefix caching on), vLLM with ProphetKV, and our own server, under the same clients: table, rows, plot.

From the repository's root, after `make vllm`:

    .venv-vllm/bin/python -P benchmarks/serving/run.py --out rows.jsonl

The chunks are those of one document, registered as such; prompts have some of them, in random order, behind words that
our servers are told (`--prompt-template`). With `--before 48` most chunks have come first in a prompt once, as in a
server that has run for a while. Each system is
started as a server, one after the other, on the same model and the same number of threads. Time to the first token
counts from the sending, so waiting for a turn is in it. Rows are appended to --out as they come, and a run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from load import BEGINNING, drive, prompts_of, summary

from prophetkv_rag.defaults import fetch_default_model, read_speeches

SYSTEMS = ("vllm", "vllm+prophetkv", "transformers+prophetkv")
QUESTIONS = ("What does the speaker say about taxes?", "Who is thanked, and what for?", "Which countries are named?")
PORT = 8771


def main() -> None:
    """Measure what is not measured yet, and print all of it."""
    args = _arguments()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(row["system"], row["clients"]) for row in rows}
    model = args.model or str(fetch_default_model())
    words = " ".join(read_speeches().values()).split()
    starts = range(0, 24 * args.chunk_words, args.chunk_words)
    chunks = [" ".join(words[start : start + args.chunk_words]) for start in starts]
    for system in args.system or SYSTEMS:
        wanted = [clients for clients in args.clients if (system, clients) not in done]
        if not wanted:
            continue
        with server(system, model, args) as (url, name):
            register(system, url, chunks)
            _measure(url, name, chunks, 4, args, count=args.before)  # what is loaded lazily
            for clients in wanted:
                row = {
                    "system": system,
                    "clients": clients,
                    "before": args.before,
                    **_measure(url, name, chunks, clients, args),
                }
                rows.append(row)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)  # noqa: T201
    print(table(rows))  # noqa: T201
    if args.plot:
        plot(rows, args.plot)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="rows, one JSON object a line")
    parser.add_argument("--model", help="directory; SmolLM2-135M-Instruct by default")
    parser.add_argument("--system", action="append", choices=SYSTEMS)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=3, help="requests a client")
    parser.add_argument("--before", type=int, default=2, help="requests that are sent before, and not timed")
    parser.add_argument("--chunks", type=int, default=4, help="chunks a prompt")
    parser.add_argument("--chunk-words", type=int, default=170)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rate", type=float, default=0.5, help="arrivals a second for each client")
    parser.add_argument("--recompute-ratio", type=float, help="by default as the server has it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-stage-tokens", type=int, help="of one step; see docs/vllm.md")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def _measure(
    url: str, name: str, chunks: list[str], clients: int, args: argparse.Namespace, count: int | None = None
) -> dict[str, Any]:
    number = count or clients * args.requests
    prompts = prompts_of(chunks, QUESTIONS, count=number, each=args.chunks, seed=clients + 1000 * (count is not None))
    started = time.perf_counter()
    rate = args.rate * clients
    answers = asyncio.run(drive(url, name, prompts, clients=clients, rate=rate, tokens=args.tokens))
    return summary(answers, time.perf_counter() - started)


def register(system: str, url: str, chunks: list[str]) -> None:
    """Have a system compute the caches of a document's chunks; vLLM alone has none."""
    if system != "vllm":
        httpx.put(f"{url}/chunks", json={"chunks": chunks, "in_order": True}, timeout=None).raise_for_status()


@contextmanager
def server(system: str, model: str, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Start a system in a process of its own; yields its address and what it calls the model."""
    engine = {"dtype": args.dtype, "max_model_len": args.max_model_len, "max_num_seqs": 16, "enforce_eager": True}
    program = [str(Path(sys.executable).with_name("prophetkv-rag")), "serve", "--model", model, "--port", str(PORT)]
    program += ["--max-queue", "1000", "--prompt-template"]
    if args.recompute_ratio is not None:
        program += ["--recompute-ratio", str(args.recompute_ratio)]
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as log:
        template, caches = Path(directory) / "prompt.txt", str(Path(directory) / "caches")
        template.write_text(f"{BEGINNING}{{context}}")
        program.insert(program.index("--prompt-template") + 1, str(template))
        if system == "vllm":
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
            command += ["--served-model-name", Path(model).name, "--port", str(PORT), "--enable-prefix-caching"]
            for option, value in engine.items():
                command += ["--" + option.replace("_", "-"), *([] if value is True else [str(value)])]
        elif system == "vllm+prophetkv":
            command = [*program, "--engine", "vllm", "--cache-dir", caches, "--vllm-args", json.dumps(engine)]
            if args.max_stage_tokens:
                command += ["--max-stage-tokens", str(args.max_stage_tokens)]
        else:
            command = [*program, "--cache-dir", caches]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | _environment())
        try:
            _until_up(process, log)
            yield f"http://127.0.0.1:{PORT}/v1", Path(model).name
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _environment() -> dict[str, str]:
    """One thread for whoever computes: the same for all systems."""
    fixed = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    chosen = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
    return fixed | {name: os.environ.get(name, value) for name, value in chosen.items()}


def _until_up(process: subprocess.Popen[bytes], log: Any) -> None:
    while True:
        if process.poll() is not None:
            log.seek(0)
            sys.exit(f"the server ended: {log.read()[-3000:]}")
        try:
            if httpx.get(f"http://127.0.0.1:{PORT}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    names = ("ttft_p50", "ttft_p95", "gap_p50", "gap_p95", "tokens_per_s", "errors")
    lines = [
        "| system | clients | TTFT p50, s | p95 | between tokens p50, s | p95 | tokens/s | errors |",
        "|" + "---|" * 8,
    ]
    for row in sorted(rows, key=lambda row: (row["clients"], SYSTEMS.index(row["system"]))):
        cells = [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names]
        lines.append(f"| {row['system']} | {row['clients']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time to the first token, time between tokens and throughput over the number of clients."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    kinds = (
        ("ttft_p50", "time to first token, p50, s"),
        ("gap_p95", "between tokens, p95, s"),
        ("tokens_per_s", "tokens/s"),
    )
    figure, places = plt.subplots(1, len(kinds), figsize=(13, 4))
    for place, (name, label) in zip(places, kinds, strict=True):
        for system in SYSTEMS:
            own = sorted((row["clients"], row[name]) for row in rows if row["system"] == system)
            if own:
                place.plot(*zip(*own, strict=True), marker="o", label=system)
        place.set_xlabel("clients")
        place.set_ylabel(label)
        place.set_xscale("log", base=2)
        place.set_xticks(clients := sorted({row["clients"] for row in rows}), list(map(str, clients)))
        place.grid(alpha=0.3)
    places[0].legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
