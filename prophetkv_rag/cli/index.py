"""`prophetkv-rag index DIR`: make or update a database of a directory's text files."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from prophetkv_rag.cli.cache.options import RemoteOptions, with_cache_options
from prophetkv_rag.cli.cache.remote import finish_uploads
from prophetkv_rag.cli.choosing import pick, print_choice, with_choice
from prophetkv_rag.cli.console import print_json, quiet_libraries
from prophetkv_rag.cli.database import check_packages, check_writable, open_database
from prophetkv_rag.cli.database_settings import (
    DEFAULT_CHUNK_SIZE,
    DEFAULT_DATABASE,
    DEFAULTS,
    SETTINGS_FILE,
    DatabaseSettings,
    find_settings,
    read_lead_in,
    save_settings,
)
from prophetkv_rag.cli.documents import Documents, read_documents
from prophetkv_rag.cli.index_report import cache_totals, caches_not_kept, print_report
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, check_load_options, chosen_model, fetch_embedding
from prophetkv_rag.cli.on_ray import JoinedCluster, check_ray, joined, workers_of
from prophetkv_rag.cli.planning import NoRoomError, choose_limit
from prophetkv_rag.cli.prompt_template import choose_template
from prophetkv_rag.cli.vllm_engine import ENGINES, VLLM_ARGS_HELP, check_engine, check_vllm_settings, refuse_with_vllm
from prophetkv_rag.config import parse_encoding
from prophetkv_rag.errors import InputError


def index(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory with text files (.txt, .md, ...).")],
    db: Annotated[Path, typer.Option(help="Database directory.")] = DEFAULT_DATABASE,
    model: Annotated[
        str | None, typer.Option(help="Model directory or name; by default the database's, else SmolLM2-135M-Instruct.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    chunk_size: Annotated[
        int | None,
        typer.Option(min=64, help=f"Tokens per chunk; by default the database's, else {DEFAULT_CHUNK_SIZE}."),
    ] = None,
    lead_in: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text file whose start all chunks are encoded behind, or 'none'; by default the database's, else "
            "none. Another one means that all KV caches are computed again.",
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            help="Which other chunks a chunk is encoded behind: plain (none), previous (of its file) or neighbours "
            "(nearest in the collection), with a number of them, or both (previous:2+neighbours:3: these for files of "
            "one chunk); by default the database's, else previous:2 "
            "(docs/encodings.md). Another one means that all KV caches are computed again.",
        ),
    ] = None,
    fidelity: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="First measure on these documents what --encoding and recompute ratio keep this share of full "
            "prefill's answer tokens (0.95, say), and use the cheapest; `ask` takes the ratio from there.",
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="With --fidelity: no longer than about this.")] = 10.0,
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --fidelity: your own questions, one a line; else made from chunks."),
    ] = None,
    cache_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most disk for KV caches, such as 20GB, or 'none'; what is used most stays."),
    ] = None,
    namespace_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most disk for the KV caches of each namespace (docs/store.md), such as 2GB, or 'none'.",
        ),
    ] = None,
    cache_format: Annotated[
        str | None, typer.Option(help="How KV caches are written: exact, bf16, fp16, int8, int4, fp8 (docs/store.md).")
    ] = None,
    cache_policy: Annotated[
        str | None, typer.Option(help="When KV caches are computed: eager (now) or on_first_use.")
    ] = None,
    remote: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Keep KV caches behind the disk too, such as s3://bucket/prefix (fsspec), or 'none'."
        ),
    ] = None,
    remote_limit: Annotated[str | None, typer.Option(metavar="SIZE", help="Most bytes there, or 'none'.")] = None,
    remote_timeout: Annotated[
        float | None, typer.Option(min=0.01, metavar="SECONDS", help="Longest that a query waits for it; 2 s.")
    ] = None,
    key_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Encrypt KV caches with the key in FILE (`cache new-key` makes one), or 'none'; the database "
            "remembers the path.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Compute on the workers of a Ray cluster (docs/ray.md): HOST:PORT, auto for the one that runs here, "
            "or nothing: Ray is started on this machine.",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --ray: how many; one a GPU, else one a machine.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE",
            help="Who computes the KV caches, and then answers: transformers, or vllm (docs/vllm.md); by default the "
            "database's, else transformers. Another one means that all KV caches are computed again.",
        ),
    ] = None,
    vllm_args: Annotated[
        str | None, typer.Option(metavar="JSON", help=f"{VLLM_ARGS_HELP} The database remembers them.")
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="With --engine vllm: what clients' prompts look like, with {context} where the chunks stand (`serve "
            "--prompt-template` says more), or 'none'; by default the database's, else none. Another one means that "
            "all KV caches are computed again.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Split the text files of DIR into chunks, embed them into Chroma and compute their KV caches.

    Files that did not change since the last time are skipped. What was indexed from other directories stays; a
    directory is known by its path.
    """
    if fidelity is not None and encoding is not None:
        msg = "--fidelity picks the encoding; leave --encoding out, or give it without --fidelity"
        raise InputError(msg)
    if fidelity is None and questions is not None:
        msg = "--questions goes with --fidelity, such as --fidelity 0.95"
        raise InputError(msg)
    documents = read_documents(directory, exclude=db)
    check_writable(db)
    remembered = find_settings(db)
    is_vllm, arguments = check_engine(engine or (remembered.engine if remembered else ENGINES[0]), vllm_args)
    has_remembered_engine = remembered is not None and (remembered.engine == "vllm") == is_vllm
    if is_vllm:
        refuse_with_vllm(
            ("--ray", ray is not None, "vLLM's own workers compute (tensor_parallel_size in --vllm-args)"),
            ("--fidelity", fidelity is not None, "it measures with transformers"),
            ("--lead-in", lead_in not in (None, "none"), "chunks are encoded behind others (--encoding)"),
            ("--dtype", dtype is not None, "give dtype in --vllm-args"),
            ("--device", device != "auto", "give its own settings in --vllm-args"),
            ("--remote", remote not in (None, "none"), "caches stay on this machine's disk"),
            ("--cache-policy", cache_policy not in (None, "eager"), "caches are computed while it indexes"),
        )
    elif prompt_template is not None:
        msg = "--prompt-template goes with --engine vllm; else chunks are encoded behind the prompt of `ask`"
        raise InputError(msg)
    size = chunk_size or (remembered.chunk_size if remembered else DEFAULT_CHUNK_SIZE)
    lead_in_tokens = remembered.lead_in_tokens if remembered else size
    chosen = str(parse_encoding(encoding or (remembered.encoding if remembered else DEFAULTS.encoding)))
    default_lead_in = remembered.lead_in if remembered and not is_vllm else ""
    if chosen != "plain" and (remembered is None or remembered.encoding != chosen):
        default_lead_in = ""  # the other chunks do what a lead-in is for
    settings = DatabaseSettings(
        model="",
        chunk_size=size,
        cached_for=remembered.cached_for if remembered else "",
        lead_in=read_lead_in(lead_in, lead_in_tokens, default_lead_in),
        lead_in_tokens=lead_in_tokens,
        encoding=chosen,
        behind_prompt=not is_vllm and (remembered.behind_prompt if remembered and has_remembered_engine else True),
        strategy=remembered.strategy if remembered and has_remembered_engine else DEFAULTS.strategy,
        recompute_ratio=remembered.recompute_ratio if remembered and has_remembered_engine else None,
        dtype=dtype or (remembered.dtype if remembered and not is_vllm else "auto"),
        engine="vllm" if is_vllm else "transformers",
        prompt_template=choose_template(
            prompt_template, remembered.prompt_template if remembered and is_vllm else None
        ),
        vllm_args=(remembered.vllm_args if remembered and is_vllm else {}) | arguments,
    )
    check_load_options(settings.dtype, device)
    tier = RemoteOptions(remote, remote_limit, remote_timeout)
    settings = with_cache_options(
        settings, remembered, cache_limit, cache_format, cache_policy, tier, key_file, namespace_limit
    )
    check_ray(ray, ray_workers, settings)
    if is_vllm:
        check_vllm_settings(settings)
    quiet_libraries()
    check_packages(settings)
    if remembered is None and cache_limit is None:
        settings = choose_limit(settings, db)
    settings = replace(settings, model=chosen_model(model, remembered.model if remembered else None))
    fetch_embedding()

    choice = None
    if fidelity is not None:
        texts = [file.text for file in documents.files]
        choice = pick(settings, texts, db, fidelity, minutes=minutes, questions=questions, device=device)
        if choice is not None:
            settings = with_choice(settings, choice)
            if not as_json:
                print_choice(choice, fidelity)
    with joined(ray, ray_workers, settings, device) as cluster:
        report = _index(db, settings, directory, documents, device, cluster, is_new=remembered is None)
    report["picked"] = None if choice is None else asdict(choice)
    if as_json:
        print_json(report)
    else:
        print_report(report)


def _index(
    db: Path,
    settings: DatabaseSettings,
    directory: Path,
    documents: Documents,
    device: str,
    cluster: JoinedCluster | None,
    *,
    is_new: bool,
) -> dict[str, Any]:
    from prophetkv_rag.cli.indexing import index_documents

    database = open_database(db, settings, device=device)
    try:
        check_chunk_size(settings.chunk_size, database.engine.context_window)
        save_settings(db, settings)
        with workers_of(cluster, database, device) as workers:
            database.bring_caches_up_to_date(None if workers is None else workers.complete)
            summary = index_documents(database, directory, documents, workers=workers)
        report = {"database": str(db), "model": settings.model, "chunk_size": settings.chunk_size}
        report |= {"engine": settings.engine, "encoding": settings.encoding, **asdict(summary)}
        report["cache_limit"], report["limit_chosen"] = settings.cache_limit, settings.limit_chosen
        report["recompute_ratio"] = settings.recompute_ratio
        finish_uploads(database.engine.store)
        report["caches"] = cache_totals(database)
        report["ray"] = None if workers is None else workers.summary()
        return report | caches_not_kept(database)
    except NoRoomError:
        if is_new:  # nothing was indexed: the next try begins anew, with what is free then
            (db / SETTINGS_FILE).unlink(missing_ok=True)
        raise
    finally:
        database.close()


def check_chunk_size(chunk_size: int, context_window: int) -> None:
    """Raise `InputError` if chunks could not be encoded, let alone be asked about."""
    if chunk_size >= context_window:
        msg = f"chunks of {chunk_size} tokens do not fit the model's context window of {context_window} tokens"
        raise InputError(msg)
