"""The errors that callers catch; user mistakes are also `ValueError`s."""

from __future__ import annotations


class ProphetKVError(Exception):
    """Base of the package's own errors."""


class InputError(ProphetKVError, ValueError):
    """The caller gave something that cannot be used; the message says what is allowed and what to do."""


class MissingExtraError(ModuleNotFoundError, InputError):
    """An optional package is not installed; the message says which extra brings it."""


class ContextWindowError(InputError):
    """A prompt or chunk is longer than the model's context window; the message has the numbers."""


class UnknownModelError(InputError):
    """A model name or path that cannot be loaded."""


class DeadlineError(ProphetKVError, TimeoutError):
    """A call's deadline passed before its prompt was prefilled, so there is nothing to answer with."""


class FetchError(ProphetKVError):
    """A model could not be fetched: no registry, not the pinned bytes, or no room; the message says which."""


class UnsupportedModelError(ProphetKVError):
    """The model's caches cannot be re-positioned exactly; the message names the reason."""


class ModelChangedError(ProphetKVError, RuntimeError):
    """The model's weights, adapters or mode are not those that the engine was made with; the message says which."""


class WorkerError(ProphetKVError):
    """Workers of a cluster do not start, or die again and again; the message says with what."""


class StoreError(ProphetKVError):
    """The blob directory or the catalog cannot be used (not writable, made by a newer version)."""


class BlobError(ProphetKVError):
    """A stored cache is truncated, corrupt or another model's; stays inside the store: the chunk is recomputed."""
