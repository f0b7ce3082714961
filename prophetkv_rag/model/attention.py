"""The seam to transformers: an attention function that hands each layer's call to the running pass.

Nothing is patched: an attention and a mask function are registered by name (`AttentionInterface`,
`AttentionMaskInterface`), and a `Cache` has layers that write rows in place. Two things beyond the public interface are
used: the configuration's private `_attn_implementation`, which is switched for the length of one pass and put back, and
a thread-local that tells the running pass. A call that somebody else makes on the same model in another thread during a
pass meets the switched setting: it gets what the model was loaded with where that is SDPA, and an error elsewhere;
holding `model_lock(model)` around such calls keeps both apart.
"""

from __future__ import annotations

import logging
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prophetkv_rag.forks import Order, around_fork

logger = logging.getLogger(__name__)

ATTENTION_NAME = "prophetkv"
"""Of passes on models that were loaded with SDPA, which other threads' calls can be given as well."""

EXCLUSIVE_NAME = "prophetkv_exclusive"
"""Of passes on models that were loaded with another attention."""


class _ModelLocks:
    """One lock per model. A fork waits for the passes that run: what a pass has switched, it puts back first."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.by_config: weakref.WeakValueDictionary[int, threading.RLock] = weakref.WeakValueDictionary()
        self._must_tell = False
        around_fork(self, "all", order=Order.MODEL, in_child=_ModelLocks._use_one_thread)
        around_fork(self, "guard")

    @property
    def all(self) -> list[threading.RLock]:
        """Those of all models."""
        return list(self.by_config.values())

    def _use_one_thread(self) -> None:
        """Keep a child from waiting for threads that are not there: OpenMP's do not cross a fork, and torch hangs."""
        if self.by_config and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
            self._must_tell = True

    def tell(self) -> None:
        """Say once, where a model is run, what the fork has changed."""
        if self._must_tell:
            self._must_tell = False
            logger.warning(
                "this process was forked from one that had loaded its model: torch computes with one thread here, "
                "since the others do not survive a fork; load the model after the fork to use more"
            )


_locks = _ModelLocks()

# The pass that runs in this thread. A keyword argument of the model's forward would be the tidier way, but some decoder
# layers (StableLM, Nemotron) do not hand unknown arguments on to their attention.
_running = threading.local()


def model_lock(model: Any) -> threading.RLock:
    """Return the lock that everything which runs this model holds: there is one per model, whoever asks.

    It belongs to the model's configuration, which is what a pass switches, so wrappers of one model share it.
    """
    with _locks.guard:
        key = id(model.config.get_text_config(decoder=True))  # configurations are not hashable
        lock = _locks.by_config.get(key)
        if lock is None:
            lock = _locks.by_config[key] = threading.RLock()
        return lock


@dataclass(slots=True)
class AttentionCall:
    """One layer's attention, as the model asked for it.

    `query` is `[b, H, m, D]`, `key` and `value` are `[b, Hkv, n, D]` as the cache layer returned them.
    """

    layer_idx: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    sliding_window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    attention_mask: torch.Tensor | None
    extra: dict[str, Any]


class AttentionPass(ABC):
    """What happens in the attention of every layer during one forward pass."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Return the attention output, `[b, m, H, Dv]`."""

    def restart(self) -> None:  # noqa: B027  # most have nothing to forget
        """Forget what was added up in a forward that failed: the pass is run once more."""


def _prophetkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    running: AttentionPass | None = getattr(_running, "attention_pass", None)
    if running is None:  # somebody else's call on the same model while a pass runs in another thread
        if softcap is not None or s_aux is not None:  # which SDPA cannot do
            raise _called_from_elsewhere()
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    call = AttentionCall(
        layer_idx=int(module.layer_idx),  # type: ignore[arg-type]
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        attention_mask=attention_mask,
        extra=kwargs,
    )
    return running.attend(call), None


def _exclusive_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    if getattr(_running, "attention_pass", None) is None:
        raise _called_from_elsewhere()
    return _prophetkv_attention(*args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Draw the mask that the running pass wants; another thread's call gets SDPA's."""
    drawn: torch.Tensor | None = getattr(_running, "mask_function", sdpa_mask)(*args, **kwargs)
    return drawn


def _exclusive_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    if getattr(_running, "attention_pass", None) is None:
        raise _called_from_elsewhere()
    return _mask(*args, **kwargs)


def _called_from_elsewhere() -> RuntimeError:
    return RuntimeError(
        "this model was called while a ProphetKVEngine runs it in another thread, and its attention cannot be had "
        "meanwhile; hold the engine's lock around calls of your own: with engine.model_lock: model(...)"
    )


@contextmanager
def attention_implementation(
    model: Any, attention_pass: AttentionPass, *, mask_function: Any = sdpa_mask
) -> Iterator[None]:
    """Hand this thread's attention calls to `attention_pass`, and put the old attention back, also after an error.

    The caller holds `model_lock(model)`.
    """
    _locks.tell()
    previous = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION_NAME if previous == "sdpa" else EXCLUSIVE_NAME
    _running.attention_pass, _running.mask_function = attention_pass, mask_function
    try:
        yield
    finally:
        del _running.attention_pass, _running.mask_function
        model.config._attn_implementation = previous


AttentionInterface.register(ATTENTION_NAME, _prophetkv_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)
AttentionInterface.register(EXCLUSIVE_NAME, _exclusive_attention)
AttentionMaskInterface.register(EXCLUSIVE_NAME, _exclusive_mask)
