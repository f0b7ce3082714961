"""Errors that LlamaIndex cannot swallow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prophetkv_rag.errors import InputError, ProphetKVError


class CallRefusedError(ProphetKVError, RuntimeError):
    """The engine refuses a prompt or a setting (`__cause__` says which: `ContextWindowError`, `InputError`).

    It is no `ValueError`: LlamaIndex's refining synthesizers, the default ones, take those for a badly formatted
    answer, log them, and answer "Empty Response".
    """


@contextmanager
def refusing() -> Iterator[None]:
    """Turn the engine's `InputError`s into `CallRefusedError`s with the same words."""
    try:
        yield
    except InputError as error:
        raise CallRefusedError(str(error)) from error
