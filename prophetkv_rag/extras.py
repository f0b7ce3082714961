"""Optional packages: one way to import them, and one sentence that says how to get the missing ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prophetkv_rag.errors import MissingExtraError


@contextmanager
def needs(extra: str, *modules: str, what: str) -> Iterator[None]:
    """Import optional packages inside the block; whoever lacks them learns what to install.

    Args:
        extra: The extra of ours that brings them.
        modules: What it brings, as it is imported. What is missing inside an installed package is that package's
            affair: such an error passes as it is.
        what: What needs them, as the beginning of a sentence.

    Raises:
        MissingExtraError: If one of them is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = error.name or ""
        # `llama_index.vector_stores` is missing where `llama_index.vector_stores.chroma` was wanted.
        if isinstance(error, MissingExtraError) or not any(f"{module}.".startswith(f"{name}.") for module in modules):
            raise
        msg = f"{what} needs the package {name!r}, which is not installed: pip install 'prophetkv-rag[{extra}]'"
        raise MissingExtraError(msg, name=name) from error
