"""`prophetkv-rag bench reuse`: what moving keys without correcting them costs, in another program and in ours."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from prophetkv_rag.cli.bench.conditions import conditions_of
from prophetkv_rag.cli.bench.gguf_choice import own_weights
from prophetkv_rag.cli.console import print_json, progress_bar, quiet_libraries, results, status
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, chosen_model, load_options
from prophetkv_rag.errors import InputError

_PEERS = ("llama.cpp",)
_COLUMNS = ("way", "recomputed", "KL to its own full prefill", "same top token", "prompts")


def reuse(
    peer: Annotated[str, typer.Option(help="Whose reuse: llama.cpp, as its server's --cache-reuse.")],
    model: Annotated[
        str | None, typer.Option(help="Model directory or name; SmolLM2-135M-Instruct by default.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    gguf: Annotated[
        Path | None, typer.Option(help="The same model for llama.cpp to read; its own weights by default.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Shipped questions to ask.")] = 6,
    context: Annotated[int, typer.Option(min=16, help="Context tokens of a prompt.")] = 1024,
    chunk_tokens: Annotated[int, typer.Option(min=16, help="Tokens per chunk.")] = 128,
    recompute_ratio: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="Ratios of ours; repeatable; 0, 0.1 and 0.2 by default.")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer compared, in tokens.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Compare answers after reuse with full prefill: each program with its own, on the same weights and prompts."""
    quiet_libraries()
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.evaluation.quality import PAPER
    from prophetkv_rag.evaluation.speed import GgufModel, measure_cache_reuse, why_not_llama_cpp
    from prophetkv_rag.evaluation.storage import demo_prompts

    if peer not in _PEERS:
        msg = f"--peer is {peer!r}; allowed: {', '.join(_PEERS)}"
        raise InputError(msg)
    reason = why_not_llama_cpp()
    if reason is not None:
        msg = f"--peer llama.cpp: {reason}"
        raise InputError(msg)
    if gguf is not None and not gguf.is_file():
        msg = f"--gguf: no file {gguf}"
        raise InputError(msg)
    load = load_options(dtype, device)
    name = chosen_model(model)
    with status(f"loading {Path(name).name}"):
        engine = ProphetKVEngine.from_pretrained(name, config=PAPER, **load)
    asked = demo_prompts(engine, count=prompts, context_tokens=context, chunk_tokens=chunk_tokens)
    with tempfile.TemporaryDirectory() as folder:
        chosen = None if gguf is None else GgufModel(gguf.stem, gguf, exact=True)
        if chosen is None:
            own, reason = own_weights(engine.model, Path(folder), prompt_cache=True)
            if own is None:
                msg = f"--peer llama.cpp: {reason}; give the model's GGUF file by --gguf"
                raise InputError(msg)
            chosen = GgufModel(own.label, own.path, exact=True)
        with progress_bar("prompts", len(asked)) as advance:
            rows = measure_cache_reuse(
                engine,
                asked,
                chosen,
                ratios=list(dict.fromkeys(recompute_ratio or (0.0, 0.1, 0.2))),
                answer_tokens=answer_tokens,
                on_step=advance,
            )
    conditions = {**conditions_of(engine, name), "gguf": chosen.label, "llama-cpp-python": _version()}
    conditions |= {"prompts": prompts, "context": context, "chunk_tokens": chunk_tokens, "answer_tokens": answer_tokens}
    if as_json:
        print_json({"conditions": conditions, "reuse": [asdict(row) for row in rows]})
        return
    console = results()
    console.print("| " + " | ".join(_COLUMNS) + " |\n|" + "---|" * len(_COLUMNS), markup=False, soft_wrap=True)
    for row in rows:
        console.print(
            f"| {row.name} | {row.recompute_ratio:.0%} | {row.kl:.4f} | {row.top1_agreement:.1%} | {row.prompts} |",
            markup=False,
            soft_wrap=True,
        )
    console.print(", ".join(f"{key} {value}" for key, value in conditions.items()), markup=False, soft_wrap=True)


def _version() -> str:
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:  # built by hand
        return "?"
