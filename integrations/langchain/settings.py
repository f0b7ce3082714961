"""What both model classes are: fields, the engine behind them, and how a call's settings come together."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from langchain_core.runnables.config import ensure_config
from pydantic import BaseModel, Field, PrivateAttr

from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.config import ProphetKVConfig
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.generation import StreamChunk
    from prophetkv_rag.prompt import AnyPrompt
    from prophetkv_rag.report import ReuseReport
    from prophetkv_rag.store import ChunkStore

ENGINE_NAMES = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "strategy": "strategy",
    "recompute_ratio": "recompute_ratio",
    "timeout": "deadline_s",
    "remember": "remember",
    "tenant": "tenant",
}
"""Our fields, LangChain's names where it has one, and the engine's names for them."""

REMOTE_ONLY = frozenset({"api_key", "base_url", "max_retries"})
"""Standard arguments of LangChain's models that mean nothing to a local one; accepted and ignored."""

CANCEL = "prophetkv_cancel"
"""Key under `config["configurable"]` for a `threading.Event` that stops the answer, through any chain."""


class EngineModel(BaseModel):
    """Fields and engine of `ChatProphetKV` and `ProphetKVLLM`; a call may override a field by the same name."""

    engine: Any = Field(default=None, exclude=True, repr=False)
    """The engine; shared by copies, never serialised."""

    model_name: str = ""
    """Name shown in traces; by default the model's own."""
    max_tokens: int = Field(default=256, gt=0)
    """Most tokens that one answer may have."""
    temperature: float = Field(default=0.0, ge=0.0)
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the likeliest tokens of this mass."""
    seed: int | None = None
    """Makes sampling repeatable."""
    stop: list[str] | None = None
    """Texts that end an answer; not part of it."""
    timeout: float | None = None
    """Seconds after which an answer ends as it is, with the finish reason `"deadline"`; waiting for the model counts.
    `DeadlineError` if they pass before the prompt is read."""
    strategy: str | None = None
    """Selection strategy; `None` for the engine's setting."""
    recompute_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share of chunk tokens recomputed; `None` for the engine's setting."""
    remember: bool | None = None
    """Whether calls go on from former prompts that begin alike, and are kept for that; `None` for the engine's own."""
    tenant: str = ""
    """Whose conversations these are: those of others are neither used nor told by the time an answer takes."""
    streaming: bool = False
    """Makes `invoke` run as a stream inside, for callbacks that show tokens."""

    _last_report: Any = PrivateAttr(default=None)

    def __init__(self, **fields: Any) -> None:
        name, known = type(self).__name__, type(self).model_fields
        for field in sorted(set(fields) - set(known) - REMOTE_ONLY):
            close = difflib.get_close_matches(field, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(ENGINE_NAMES)}, stop, model_name"
            msg = f"{name} has no setting {field!r}; {hint}"
            raise InputError(msg)
        engine: ProphetKVEngine | None = fields.get("engine")
        if engine is None or engine.tokenizer is None:
            missing = "an engine" if engine is None else "an engine with a tokenizer"
            msg = f"{name} needs {missing}: {name}(engine=...) or {name}.from_pretrained(name_or_path)"
            raise InputError(msg)
        fields["model_name"] = fields.get("model_name") or _name_of(engine.model)
        super().__init__(**fields)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        config: ProphetKVConfig | None = None,
        store: ChunkStore | None = None,
        **fields: Any,
    ) -> Self:
        """Load a model into an engine of its own; `model.engine` is what `ProphetKVChroma` needs.

        Args:
            name_or_path: Hub name or local directory, in transformers' format.
            config: The engine's settings.
            store: Where chunk caches are kept; RAM by default.
            **fields: Fields of this class.
        """
        from prophetkv_rag.engine import ProphetKVEngine

        return cls(engine=ProphetKVEngine.from_pretrained(name_or_path, config=config, store=store), **fields)

    def __getstate__(self) -> dict[Any, Any]:
        """Pickle the settings without the engine: weights do not travel."""
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "engine": None}}

    @property
    def last_report(self) -> ReuseReport | None:
        """What the most recent call on this object reused; `None` before the first. A stream sets it when it starts.

        Enough for scripts and notebooks; with several threads at work, read `response_metadata["prophetkv"]` instead.
        """
        return self._last_report

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Every setting that changes an answer: what traces show, and what LangChain's LLM cache goes by."""
        fields = {name: getattr(self, name) for name in (*ENGINE_NAMES, "stop", "model_name")}
        return {**fields, "fingerprint": self._ready_engine().identity.model}

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text by the model's own tokenizer, without special tokens around it."""
        if getattr(self, "custom_get_token_ids", None) is not None:
            return list(self.custom_get_token_ids(text))  # type: ignore[attr-defined]
        return self._ready_engine().library.tokens.fresh(text)

    def _ready_engine(self) -> ProphetKVEngine:
        if self.engine is None:
            name = type(self).__name__
            msg = f"this {name} was unpickled without its engine; set model.engine, or make a new one: {name}(engine=)"
            raise InputError(msg)
        engine: ProphetKVEngine = self.engine
        return engine

    def _engine_settings(self, stop: Sequence[str] | None, call: dict[str, Any]) -> dict[str, Any]:
        """Return the engine's keyword arguments: this object's fields, overridden by the call's."""
        settings = {
            theirs: getattr(self, ours) if call.get(ours) is None else call[ours]
            for ours, theirs in ENGINE_NAMES.items()
        }
        chosen = stop if stop is not None else self.stop
        settings["stop"] = [chosen] if isinstance(chosen, str) else list(chosen or ())
        cancel = call.get("cancel") or ensure_config().get("configurable", {}).get(CANCEL)
        if cancel is not None and not isinstance(cancel, threading.Event):
            msg = f"cancel is {cancel!r}; it must be a threading.Event"
            raise InputError(msg)
        return {**settings, "cancel": cancel, "query": call.get("query")}

    def _run(self, prompt: AnyPrompt, settings: dict[str, Any]) -> Generator[StreamChunk, None, None]:
        """Stream an answer and remember its report; closing this generator stops the generation."""
        with closing(self._ready_engine().stream(prompt, **settings)) as chunks:
            for chunk in chunks:
                self._last_report = chunk.report
                yield chunk


def cancel_on_leave(settings: dict[str, Any]) -> Callable[[], None] | None:
    """Give a call an event of its own, unless the caller brought one, and return what sets it.

    A call that waits for the model then gives up at once when its task is cancelled.
    """
    if settings["cancel"] is not None:
        return None
    left = threading.Event()
    settings["cancel"] = left
    return left.set


def _name_of(model: Any) -> str:
    """Return the model's hub name, or the last part of the directory it was loaded from."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).is_dir() else name
