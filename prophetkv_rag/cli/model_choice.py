"""Which model a command uses: the one named, the one the database was made with, or the default."""

from __future__ import annotations

import os

from prophetkv_rag.cli.console import status
from prophetkv_rag.errors import UnknownModelError
from prophetkv_rag.home import expand_user, require_home

HUB_TIMEOUT_S = 5.0
_HUB_CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


def chosen_model(named: str | None, remembered: str | None = None) -> str:
    """Return a local path (absolute) or a hub name; fetches the default model if nothing else is chosen.

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
    return str(path.resolve()) if path.exists() else _on_the_hub(name)


def _on_the_hub(name: str) -> str:
    """Return the name if the hub answers for it, or the cached copy's directory where it does not answer.

    Asked first, because transformers' own attempt to reach a hub that is not there goes on for half a minute.
    """
    if not any(os.environ.get(variable) for variable in _HUB_CACHE_VARIABLES):
        require_home("the model hub's cache")  # its library would make a directory called ~
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    with status(f"looking for {name}"):
        try:
            HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        except (HFValidationError, RepositoryNotFoundError) as error:
            msg = f"there is no model {name!r}: it is neither a directory here nor a model on the hub"
            raise UnknownModelError(msg) from error
        except Exception:  # offline, a gated model, a hub in trouble: the cache may have it
            try:
                return snapshot_download(name, local_files_only=True)
            except LocalEntryNotFoundError as error:
                msg = (
                    f"there is no model {name!r}: it is not a directory here, the model hub does not answer for it, "
                    "and its local cache does not have it"
                )
                raise UnknownModelError(msg) from error
    return name


def fetch_embedding() -> None:
    """Make sure the embedding model is there, telling what is done."""
    from prophetkv_rag.defaults import fetch_embedding_model

    with status("looking for the embedding model") as tell:
        fetch_embedding_model(tell)
