"""`prophetkv-rag serve`: an OpenAI-compatible server on a database's caches, or on chunks that clients register."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prophetkv_rag.cli.cache.options import parse_size
from prophetkv_rag.cli.console import print_json, progress_console
from prophetkv_rag.cli.database_settings import DEFAULT_DATABASE
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, check_load_options
from prophetkv_rag.cli.prompt_template import TEMPLATE_HELP, read_prompt_template
from prophetkv_rag.cli.serving import ServedCaches, check_served_by_vllm, open_served, open_served_in_vllm
from prophetkv_rag.cli.vllm_engine import ENGINES, VLLM_ARGS_HELP, check_engine, refuse_with_vllm
from prophetkv_rag.errors import InputError
from prophetkv_rag.extras import needs

if TYPE_CHECKING:
    from fastapi import FastAPI

KEY_VARIABLE = "PROPHETKV_API_KEY"
_LOOPBACK = ("localhost", "::1")
_BATCH = 4  # as many prompts' caches are held at a time


def serve(
    database: Annotated[
        Path | None,
        typer.Option(
            "--database", "--db", help=f"Directory made by `prophetkv-rag index`; {DEFAULT_DATABASE} if it is there."
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Without a database: keep the caches of registered chunks here, not in memory.")
    ] = None,
    remote: Annotated[
        str | None, typer.Option(metavar="URL", help="With --cache-dir: a remote tier behind it, as in `index`.")
    ] = None,
    cache_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Without a database: most KV caches there, or in memory, such as 20GB, or 'none'; by default half of "
            "what is free.",
        ),
    ] = None,
    ram_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Most memory for KV caches in front of the disk; by default a quarter of what is free."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Path or hub name; with a database, all its caches are computed for this one.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    model_name: Annotated[str | None, typer.Option(help="What clients call the model; its path's last part.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default serves this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"File with the API keys, one a line; else the variable {KEY_VARIABLE}.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Web pages of this origin (https://chat.example.com) may call the server; repeatable; * for any.",
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Answers that are decoded together, each with its prompt's cache in memory; 4."),
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of the prompts and answers in memory for that; 32768."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; further ones get status 429.")] = 32,
    max_body: Annotated[int, typer.Option(min=1, help="Longest request body, in KiB.")] = 8192,
    deadline: Annotated[float | None, typer.Option(help="Longest time for a request, waiting included, in s.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer where a request does not say.")] = 512,
    strategy: Annotated[str, typer.Option(help="Which chunk tokens are recomputed.")] = "prophetkv",
    recompute_ratio: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of chunk tokens recomputed: 0 plain reuse, 1 full prefill; by default 0.05 of chunks that were "
            "encoded behind others, 0.2 of those that were encoded alone.",
        ),
    ] = None,
    prompt_template: Annotated[Path | None, typer.Option(metavar="FILE", help=TEMPLATE_HELP)] = None,
    remember: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most memory for conversations, which go on from it: 1GB; or 0.")
    ] = None,
    max_conversation: Annotated[
        str, typer.Option(metavar="SIZE", help="Longest conversation that clients may save and load.")
    ] = "512MB",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE",
            help="Who runs the model: transformers, or vllm, with --cache-dir or a database of `index --engine vllm`; "
            "by default the database's.",
        ),
    ] = None,
    vllm_args: Annotated[str | None, typer.Option(metavar="JSON", help=VLLM_ARGS_HELP)] = None,
    max_stage_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --engine vllm: rows that one step may spend on reuse.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0.0, help="On shutdown, seconds for the answer that is running.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the server listens.")] = False,
) -> None:
    """Serve the model with OpenAI's chat API, reusing the KV caches of chunks found in prompts."""
    create_app = _import_server()
    from prophetkv_rag.config import BATCH_TOKENS, REMEMBER_BYTES, ProphetKVConfig
    from prophetkv_rag.reuse import make_strategy
    from prophetkv_rag.server import ServerSettings

    if database is not None and cache_dir is not None:
        msg = "--database has its own caches; leave --cache-dir out"
        raise InputError(msg)
    if remote is not None and cache_dir is None:
        msg = "--remote goes with --cache-dir; a database has the remote tier that `index` gave it"
        raise InputError(msg)
    served_caches = ServedCaches.asked(database, cache_dir, remote, cache_limit, ram_limit)
    if prompt_template is not None and served_caches.database is not None:
        msg = "--prompt-template goes without a database, whose chunks stand behind what `index` put them behind"
        raise InputError(msg)
    template = read_prompt_template(prompt_template)
    remembered = served_caches.settings
    is_vllm, arguments = check_engine(engine or (remembered.engine if remembered else ENGINES[0]), vllm_args)
    if is_vllm:
        check_served_by_vllm(served_caches)
        refuse_with_vllm(
            ("--remote", remote is not None, "caches stay on this machine's disk"),
            ("--strategy", strategy != "prophetkv", "it is prophetkv (a request may name full_reuse or full_prefill)"),
            ("--remember", remember is not None, "it keeps former prompts by itself"),
            ("--max-batch", max_batch is not None, "give max_num_seqs in --vllm-args"),
            ("--max-batch-tokens", max_batch_tokens is not None, "give max_num_batched_tokens in --vllm-args"),
            ("--ram-limit", ram_limit is not None, "ram_bytes is one of its connector's settings (docs/vllm.md)"),
            ("--dtype", dtype is not None, "give dtype in --vllm-args"),
            ("--device", device != "auto", "give its own settings in --vllm-args"),
        )
    check_load_options(dtype or "auto", device)
    make_strategy(strategy)
    settings = ServerSettings(
        model_name="model",
        api_keys=_api_keys(api_key_file),
        cors_origins=tuple(cors_origin or ()),
        max_queue=max_queue,
        max_body_bytes=max_body * 1024,
        max_conversation_bytes=_bytes_of("--max-conversation", max_conversation),
        deadline_s=deadline,
        default_max_tokens=max_new_tokens,
    )
    config = ProphetKVConfig(
        strategy=strategy,
        recompute_ratio=recompute_ratio,
        prompt_template=template,
        remember_bytes=REMEMBER_BYTES if remember is None else _bytes_of("--remember", remember),
        max_batch=max_batch or _BATCH,
        max_batch_tokens=max_batch_tokens or BATCH_TOKENS,
    )
    connector: dict[str, Any] = {"max_stage_tokens": max_stage_tokens}
    if recompute_ratio is not None:
        connector["recompute_ratio"] = recompute_ratio
    if template is not None:
        connector["prompt_template"] = template
    console = progress_console()
    if not settings.api_keys and not is_loopback(host):
        console.print(
            f"warning: listening on {host} without an API key: everybody who reaches this port can use the model and "
            f"the chunks; set {KEY_VARIABLE} or --api-key-file",
            markup=False,
            soft_wrap=True,
        )
    if not settings.api_keys and "*" in settings.cors_origins:
        console.print(
            "warning: --cors-origin is * and there is no API key: every web page that somebody opens on a machine that "
            "reaches this port can use the model and the chunks; name the origins, or set "
            f"{KEY_VARIABLE} or --api-key-file",
            markup=False,
            soft_wrap=True,
        )
    with (
        _bound_socket(host, port) as listening,
        (
            open_served_in_vllm(served_caches, model, arguments, **connector)
            if is_vllm
            else open_served(served_caches, model, config, dtype=dtype, device=device)
        ) as (served, name),
    ):
        settings = replace(settings, model_name=model_name or name)
        app = create_app(served, settings)
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listening.getsockname()[1]}/v1"
        if as_json:
            ready = {"url": url, "model": settings.model_name, "chunks": len(served.chunk_index)}
            run_server(app, listening, grace, lambda: print_json(ready))
        else:
            text = f"{settings.model_name} at {url}, {len(served.chunk_index)} chunks known; Ctrl-C stops it"
            run_server(app, listening, grace, lambda: console.print(text, markup=False, soft_wrap=True))
        console.print("stopped", markup=False)


def _bytes_of(option: str, size: str) -> int:
    found = parse_size(size)
    if found is None:
        msg = f"{option} is 'none'; give the most bytes, such as 2GB, or 0 for nothing"
        raise InputError(msg)
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    return host in _LOOPBACK or host.startswith("127.")


def run_server(app: FastAPI, listening: socket.socket, grace_s: float, when_ready: Any) -> None:
    """Serve until SIGINT or SIGTERM: then what waits is turned away, and what runs has `grace_s` to finish."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            when_ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.services.drain()
            await super().shutdown(sockets=sockets)

    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=max(1, round(grace_s))
    )
    # uvicorn raises the signal once more when it is done, which would end us before files are closed.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(config).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _import_server() -> Any:
    with needs("server", "uvicorn", what="this command"):
        import uvicorn  # noqa: F401
    from prophetkv_rag.server import create_app

    return create_app


def _api_keys(file: Path | None) -> tuple[str, ...]:
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return (key,) if key else ()
    try:
        keys = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        msg = f"the API keys cannot be read from {file}: {getattr(error, 'strerror', None) or type(error).__name__}"
        raise InputError(msg) from None
    if not keys:
        msg = f"{file} holds no API key; write one on a line of its own"
        raise InputError(msg)
    return keys


@contextmanager
def _bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port before the model is loaded; connections are refused until the server listens on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            msg = f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host"
            raise InputError(msg) from error
        yield listening
