"""Which model a command uses: the one named, the one the database was made with, or the default."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from prophetkv_rag.cli.console import progress_console, status
from prophetkv_rag.errors import UnknownModelError
from prophetkv_rag.home import expand_user, require_home

HUB_TIMEOUT_S = 5.0
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Compute in auto, float32, bfloat16 or float16; auto is float32 on a CPU and the model's own on a GPU. KV "
        "caches belong to one of them, and a database remembers it.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="Run the model on auto, cpu, cuda, cuda:N or mps; auto is a GPU if there is one."),
]
_HUB_CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


def chosen_model(named: str | None, remembered: str | None = None) -> str:
    """Return a local path (absolute) or a hub name; fetches the default model if nothing else is chosen.

    `OWNER/NAME:PART` is the `.gguf` file of a model on the hub that has that part in its name (`:Q4_K_M`); where there
    is one file alone, its name says enough.

    Raises:
        UnknownModelError: If a name is neither a path nor a model that the hub or its local cache has.
        FetchError: If the default model cannot be fetched.
    """
    if named is None and remembered is None:
        from prophetkv_rag.defaults import fetch_default_model

        with status("looking for the default model") as tell:
            return str(fetch_default_model(tell))
    name = named if named is not None else str(remembered)
    path = expand_user(name, what="--model")
    return str(path.resolve()) if path.exists() else _on_the_hub(*name.partition(":")[::2])


def _on_the_hub(name: str, part: str = "") -> str:
    """Return the name if the hub answers for it, or the cached copy's directory where it does not answer.

    Asked first, because transformers' own attempt to reach a hub that is not there goes on for half a minute.
    """
    if not any(os.environ.get(variable) for variable in _HUB_CACHE_VARIABLES):
        require_home("the model hub's cache")  # its library would make a directory called ~
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    with status(f"looking for {name}"):
        try:
            found = HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
            files = [one.rfilename for one in getattr(found, "siblings", None) or ()]
        except (HFValidationError, RepositoryNotFoundError) as error:
            msg = f"there is no model {name!r}: it is neither a directory here nor a model on the hub"
            raise UnknownModelError(msg) from error
        except Exception:  # offline, a gated model, a hub in trouble: the cache may have it
            try:
                folder = Path(snapshot_download(name, local_files_only=True))
            except LocalEntryNotFoundError as error:
                msg = (
                    f"there is no model {name!r}: it is not a directory here, the model hub does not answer for it, "
                    "and its local cache does not have it"
                )
                raise UnknownModelError(msg) from error
            files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
            return str(folder / chosen) if (chosen := _gguf_of(files, name, part)) else str(folder)
        chosen = _gguf_of(files, name, part)
        return hf_hub_download(name, chosen) if chosen else name


def _gguf_of(files: list[str], name: str, part: str) -> str | None:
    """Return the `.gguf` file that is meant; `None` for a model in transformers' format."""
    from prophetkv_rag.model import one_gguf

    found = [file for file in files if file.endswith(".gguf")]
    if not part and ("config.json" in files or not found):
        return None
    return one_gguf(found, f"{name} (named as {name}:PART)", part)


def check_load_options(dtype: str, device: str) -> None:
    """Raise `InputError` for a dtype that is none and a device that is not here, before anything is fetched."""
    from prophetkv_rag.model import device_of, dtype_of

    dtype_of(dtype)
    device_of(device)


def load_options(dtype: str | None, device: str) -> dict[str, Any]:
    """Return what `load_model` takes for these options; slow ones are said. `InputError` for what is not here."""
    import torch

    from prophetkv_rag.model import device_of, dtype_of

    numbers, where = dtype_of(dtype or "auto"), device_of(device)
    is_cpu = where.type == "cpu" if where is not None else not torch.cuda.is_available()
    if is_cpu and numbers in (torch.float16, torch.bfloat16):
        progress_console().print(f"{dtype} on a CPU halves the memory, and is slower than float32", markup=False)
    return {"dtype": numbers, "device": where}


def fetch_embedding() -> None:
    """Make sure the embedding model is there, telling what is done."""
    from prophetkv_rag.defaults import fetch_embedding_model

    with status("looking for the embedding model") as tell:
        fetch_embedding_model(tell)
