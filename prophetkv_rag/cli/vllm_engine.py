"""`--engine vllm`: what `serve` and `doctor` have in common of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophetkv_rag.cli.console import quiet_libraries, status
from prophetkv_rag.cli.model_choice import chosen_model
from prophetkv_rag.cli.serving import ServedCaches, chosen_limit, say_what_caches_take
from prophetkv_rag.errors import InputError, ProphetKVError

if TYPE_CHECKING:
    from prophetkv_rag.config import ProphetKVConfig
    from prophetkv_rag.integrations.vllm import VLLMEngine

VLLM_ARGS_HELP = "With --engine vllm: its settings, such as '{\"max_model_len\": 8192}'; see docs/vllm.md."
_OURS = ("model", "kv_transfer_config")


def check_engine(engine: str, vllm_args: str | None) -> tuple[bool, dict[str, Any]]:
    """Return whether it is vLLM, and vLLM's settings.

    Raises:
        InputError: For another engine, or settings that are no JSON object or not the user's to give.
    """
    if engine not in ("transformers", "vllm"):
        msg = f"--engine is {engine!r}; allowed: transformers, vllm"
        raise InputError(msg)
    if vllm_args is None:
        return engine == "vllm", {}
    if engine != "vllm":
        msg = "--vllm-args goes with --engine vllm"
        raise InputError(msg)
    try:
        arguments = json.loads(vllm_args)
    except ValueError as error:
        msg = f"--vllm-args is no JSON: {error}"
        raise InputError(msg) from error
    if not isinstance(arguments, dict) or any(name in arguments for name in _OURS):
        msg = f"--vllm-args must be a JSON object of vLLM's settings without {' and '.join(_OURS)}, which are set here"
        raise InputError(msg)
    return True, arguments


def before_vllm() -> None:
    """Set what vLLM reads when it is imported, where the user has not."""
    quiet_libraries()
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@contextmanager
def open_in_vllm(
    model: str | None,
    caches: ServedCaches,
    config: ProphetKVConfig,
    max_stage_tokens: int | None,
    arguments: Mapping[str, Any],
) -> Iterator[tuple[VLLMEngine, str]]:
    """Start vLLM; yields what the server answers with, and the model's name.

    Should vLLM die, this process gets SIGTERM, as whoever started it would send it.

    Raises:
        ProphetKVError: At the end, if vLLM has died.
    """
    before_vllm()
    from prophetkv_rag.integrations.vllm import ConnectorSettings, VLLMEngine

    assert caches.cache_dir is not None, "checked by serve"
    settings = ConnectorSettings(
        directory=str(caches.cache_dir.absolute()),
        recompute_ratio=config.recompute_ratio,
        prompt_template=config.prompt_template,
        max_bytes=caches.disk_bytes if caches.is_limited else chosen_limit(caches.cache_dir),
        max_stage_tokens=max_stage_tokens,
    )
    chosen = chosen_model(model)
    with status(f"loading {Path(chosen).name} in vLLM"):
        engine = VLLMEngine(chosen, settings, arguments)
    engine.watch(lambda: os.kill(os.getpid(), signal.SIGTERM))
    say_what_caches_take(engine.store)
    try:
        yield engine, Path(chosen).name
    finally:
        engine.close()
    if engine.has_died:
        msg = "vLLM has died: one of its processes ended, see above; start the server again"
        raise ProphetKVError(msg)
