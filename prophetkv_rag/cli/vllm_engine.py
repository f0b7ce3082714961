"""`--engine vllm`: what the commands that take it have in common."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophetkv_rag.cli.console import quiet_libraries, status
from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.cli.database_settings import DatabaseSettings
    from prophetkv_rag.integrations.vllm import VLLMEngine

ENGINES = ("transformers", "vllm")
VLLM_ARGS_HELP = "With --engine vllm: its settings, such as '{\"max_model_len\": 8192}'; see docs/vllm.md."
_OURS = ("model", "kv_transfer_config")


def check_engine(engine: str, vllm_args: str | None) -> tuple[bool, dict[str, Any]]:
    """Return whether it is vLLM, and vLLM's settings.

    Raises:
        InputError: For another engine, or settings that are no JSON object or not the user's to give.
    """
    if engine not in ENGINES:
        msg = f"--engine is {engine!r}; allowed: {', '.join(ENGINES)}"
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


def refuse_with_vllm(*options: tuple[str, bool, str]) -> None:
    """Raise `InputError` for the first option that is not for vLLM and was given.

    Args:
        *options: Name, whether it was given, and what to do instead.
    """
    for name, is_given, instead in options:
        if is_given:
            msg = f"{name} is not for --engine vllm: {instead}"
            raise InputError(msg)


def before_vllm() -> None:
    """Set what vLLM reads when it is imported, where the user has not."""
    quiet_libraries()
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for results
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def check_vllm() -> None:
    """Raise `MissingExtraError` where vLLM is not installed, before anything is fetched for it."""
    before_vllm()
    from prophetkv_rag.integrations.vllm import VLLMEngine  # noqa: F401


def start_vllm(model: str, directory: Path, arguments: Mapping[str, Any], **connector: Any) -> VLLMEngine:
    """Load a model in vLLM.

    Args:
        model: Path or hub name.
        directory: Of the caches.
        arguments: Keywords of vLLM's `AsyncEngineArgs`.
        **connector: Other fields of `ConnectorSettings`.

    Raises:
        InputError: If vLLM is not installed, or cannot be set so.
        UnsupportedModelError: For a model whose caches cannot be re-positioned exactly.
    """
    check_vllm()
    from prophetkv_rag.integrations.vllm import ConnectorSettings, VLLMEngine

    settings = ConnectorSettings(directory=str(directory.absolute()), **connector)
    with status(f"loading {Path(model).name} in vLLM"):
        return VLLMEngine(model, settings, arguments)


def check_vllm_settings(settings: DatabaseSettings) -> None:
    """Raise `InputError` for what a database that vLLM computes cannot be, such as one of transformers has become."""
    refuse_with_vllm(
        ("a remote tier", bool(settings.remote), "give --remote none"),
        ("--cache-policy on_first_use", settings.cache_policy != "eager", "give --cache-policy eager"),
    )


def connector_settings(settings: DatabaseSettings) -> dict[str, Any]:
    """Return what `start_vllm` takes of a database, beside model, directory and vLLM's own settings."""
    return {
        "encoding": settings.encoding,
        "prompt_template": settings.prompt_template,
        "recompute_ratio": settings.recompute_ratio,
        "max_bytes": settings.cache_limit,
        "namespace_max_bytes": settings.namespace_limit,
        "cache_format": settings.cache_format,
        "key_file": settings.key_file or None,
    }
