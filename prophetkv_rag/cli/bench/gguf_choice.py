"""Which GGUF files `bench ttft` gives to llama.cpp: the user's or the default model's, and the model's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prophetkv_rag.cli.console import status
from prophetkv_rag.errors import FetchError, InputError

if TYPE_CHECKING:
    from prophetkv_rag.evaluation.speed import GgufModel


def check_gguf_option(gguf: Path, *, peers: bool) -> None:
    """Raise `InputError` if `--gguf` cannot be done; before anything is measured."""
    from prophetkv_rag.evaluation.speed import why_not_llama_cpp

    if not peers:
        msg = "--gguf is for llama.cpp, which --no-peers leaves out; give one of the two"
        raise InputError(msg)
    reason = why_not_llama_cpp()
    if reason is not None:
        msg = f"--gguf: {reason}"
        raise InputError(msg)
    if not gguf.is_file():
        msg = f"--gguf: no file {gguf}"
        raise InputError(msg)


def choose_ggufs(
    engine: Any, gguf: Path | None, *, is_default: bool, folder: Path
) -> tuple[list[GgufModel], list[str]]:
    """Return what llama.cpp is measured on, and what is left out, each with its reason.

    Args:
        engine: Of the model that is measured.
        gguf: The user's own file.
        is_default: Whether the model is the default one, whose file is known.
        folder: Where the model's own weights are written to.

    Raises:
        InputError: If the user's file cannot be loaded, or is another model's.
    """
    from prophetkv_rag.evaluation.speed import GgufModel, check_gguf, why_not_llama_cpp

    reason = why_not_llama_cpp()
    if reason is None and engine.model.device.type != "cpu":
        reason = "it is measured beside a model on the CPU only"
    if reason is not None:
        return [], [f"llama.cpp: {reason}"]
    found: list[GgufModel] = []
    left_out = []
    if gguf is not None:
        found.append(GgufModel(gguf.stem, gguf))
        check_gguf(engine, found[0])
    elif is_default:
        from prophetkv_rag.defaults import fetch_default_gguf

        try:
            with status("looking for the default model's GGUF file") as tell:
                found.append(GgufModel("Q4_1", fetch_default_gguf(tell)))
        except FetchError as error:
            left_out.append(f"llama.cpp on the default model's GGUF file: {error}")
    own, reason = own_weights(engine.model, folder, prompt_cache=not found)
    if own is not None:
        found.append(own)
    elif found:
        left_out.append(f"llama.cpp on the model's own weights: {reason}")
    else:
        left_out.append(f"llama.cpp: {reason}; give the model's GGUF file by --gguf")
    return found, left_out


def own_weights(model: Any, folder: Path, *, prompt_cache: bool) -> tuple[GgufModel | None, str | None]:
    """Write a model's own weights for llama.cpp; returns the file, or why there is none."""
    from prophetkv_rag.evaluation.speed import GgufModel, format_of, why_not_gguf, write_gguf

    reason = why_not_gguf(model)
    if reason is not None:
        return None, reason
    name = format_of(model)
    path = folder / f"{name}.gguf"
    try:
        with status("writing the model's own weights for llama.cpp"):
            write_gguf(model, path)
    except InputError as error:  # the package gguf is missing
        return None, str(error)
    except OSError as error:
        return None, f"the weights cannot be written to {folder}: {error.strerror or error}"
    return GgufModel(f"{name}, same weights", path, prompt_cache), None
