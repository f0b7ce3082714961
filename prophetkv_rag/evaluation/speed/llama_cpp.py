"""llama.cpp beside us, where `llama-cpp-python` is installed: full prefill, and its prompt cache.

It is fed the same token ids by as many threads as torch has, and picks its first token greedily. Its prompt cache keeps
the rows that the new prompt begins with: those in its context (what it does by itself between two calls), or those of a
state saved earlier and put back (what `LlamaRAMCache` does for one prompt among many).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.speed.peers import Peer, has_other_order, num_shared, other_order, other_question
from prophetkv_rag.prompt import Prompt

BATCH_TOKENS = 512
"""Rows per pass: the default of llama.cpp and its Python binding."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A file for llama.cpp to read.

    Attributes:
        label: Names its rows in the tables.
        path: The GGUF file.
        prompt_cache: Whether its prompt cache is measured too, not only full prefill.
        exact: Keep the KV cache in f32, to compare numbers; otherwise f16, its default.

    Its flash attention is used where full prefill is measured alone: on a CPU it is somewhat faster for a whole prompt,
    and several times slower for the few rows after a prefix.
    """

    label: str
    path: Path
    prompt_cache: bool = True
    exact: bool = False


def why_not_llama_cpp() -> str | None:
    """Return why llama.cpp cannot be used here, in a few words; `None` if it can."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return "llama-cpp-python is not installed (pip install llama-cpp-python, which compiles it)"
    except (OSError, RuntimeError) as error:  # its library is not there, or does not fit this machine
        return f"llama-cpp-python cannot be loaded: {error}"
    return None


def check_gguf(engine: ProphetKVEngine, gguf: GgufModel) -> None:
    """Raise `InputError` if llama.cpp cannot load the file, or it is another model's; before anything is measured."""
    open_llama_cpp(engine, gguf, num_tokens=1).close()


def open_llama_cpp(engine: ProphetKVEngine, gguf: GgufModel, *, num_tokens: int) -> Any:
    """Return a `llama_cpp.Llama` with room for a prompt of `num_tokens` and its first token, on torch's threads.

    Raises:
        InputError: If the file cannot be loaded, or its vocabulary is not that of the engine's model.
    """
    import llama_cpp
    import torch

    kind = llama_cpp.GGML_TYPE_F32 if gguf.exact else llama_cpp.GGML_TYPE_F16
    try:
        llama = llama_cpp.Llama(
            str(gguf.path),
            n_ctx=num_tokens + 1,
            n_batch=BATCH_TOKENS,
            n_ubatch=BATCH_TOKENS,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            type_k=kind,
            type_v=kind,
            flash_attn=not (gguf.prompt_cache or gguf.exact),
            verbose=False,
        )
    except (ValueError, OSError) as error:
        msg = f"llama.cpp cannot load {gguf.path}: {error}; give a GGUF file of the model that is measured"
        raise InputError(msg) from error
    vocab_size = engine.model.config.get_text_config(decoder=True).vocab_size
    if llama.n_vocab() != vocab_size:
        msg = (
            f"{gguf.path} has {llama.n_vocab()} tokens in its vocabulary and the model has {vocab_size}; "
            "give a GGUF file of the model that is measured"
        )
        llama.close()
        raise InputError(msg)
    return llama


class LlamaCppFull:
    """llama.cpp runs the whole prompt."""

    def __init__(self, llama: Any, label: str, input_ids: Sequence[int]) -> None:
        self.name = f"llama.cpp {label}, full prefill"
        self.llama = llama
        self.input_ids = list(input_ids)
        self.first_token: int | None = None

    def seconds(self) -> float:
        """Return the time to the first token."""
        self.llama.reset()
        return self._timed(time.perf_counter())

    def _timed(self, started: float) -> float:
        # `generate` itself keeps what the context and the prompt begin with alike.
        self.first_token = next(self.llama.generate(self.input_ids, temp=0.0, repeat_penalty=1.0))
        return time.perf_counter() - started


class LlamaCppPrefix(LlamaCppFull):
    """The context of llama.cpp still holds an earlier prompt."""

    def __init__(self, llama: Any, label: str, input_ids: Sequence[int], earlier: Sequence[int], *, order: str) -> None:
        """Run the earlier prompt and keep its state."""
        super().__init__(llama, label, input_ids)
        self.name = f"llama.cpp {label}, {order}"
        self.earlier = list(earlier)
        self.num_shared = num_shared(input_ids, earlier)
        llama.reset()
        llama.eval(self.earlier)
        self.state = _saved_state(llama)

    def seconds(self) -> float:
        """Return the time to the first token; what puts the earlier prompt back for another round is not in it."""
        self._restore()
        return self._timed(time.perf_counter())

    def _restore(self) -> None:
        _load_state(self.llama, self.state, self.earlier)


class LlamaCppSavedState(LlamaCppPrefix):
    """The earlier prompt's state was saved and is put back first, as the context holds another prompt by now."""

    def seconds(self) -> float:
        """Return the time to the first token, loading the state included."""
        self.llama.reset()
        started = time.perf_counter()
        self._restore()
        return self._timed(started)


def _saved_state(llama: Any) -> Any:
    import llama_cpp

    size = llama_cpp.llama_state_seq_get_size(llama.ctx, 0)
    state = (ctypes.c_uint8 * size)()
    if llama_cpp.llama_state_seq_get_data(llama.ctx, state, size, 0) != size:
        msg = "llama.cpp did not save its state"
        raise RuntimeError(msg)
    return state


def _load_state(llama: Any, state: Any, input_ids: Sequence[int]) -> None:
    """Put a state back; the binding's own `load_state` also copies 100 MB of logits that nobody needs."""
    import llama_cpp

    if llama_cpp.llama_state_seq_set_data(llama.ctx, state, len(state), 0) != len(state):
        msg = "llama.cpp did not load its state"
        raise RuntimeError(msg)
    llama.input_ids[: len(input_ids)] = input_ids
    llama.n_tokens = len(input_ids)


def llama_cpp_peers(
    engine: ProphetKVEngine, prompt: Prompt, gguf: GgufModel
) -> tuple[AbstractContextManager[Any], list[Peer]]:
    """Return what llama.cpp does on this prompt, and what closes its model."""
    ids = engine.read(prompt).input_ids.tolist()
    earlier = {"same order": engine.read(other_question(prompt)).input_ids.tolist()}
    if has_other_order(prompt):
        earlier["other order"] = engine.read(other_order(prompt)).input_ids.tolist()
    llama = open_llama_cpp(engine, gguf, num_tokens=max(map(len, (ids, *earlier.values()))))
    peers: list[Peer] = [LlamaCppFull(llama, gguf.label, ids)]
    if gguf.prompt_cache:
        peers += [LlamaCppPrefix(llama, gguf.label, ids, other, order=order) for order, other in earlier.items()]
        order = "same order, saved state"
        peers.append(LlamaCppSavedState(llama, gguf.label, ids, earlier["same order"], order=order))
    return closing(llama), peers
