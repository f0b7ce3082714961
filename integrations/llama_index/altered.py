"""Caches for texts that no vector store holds: what node postprocessors make of retrieved nodes.

Sentence windows, compressed and merged nodes reach the prompt as texts that were never indexed, so nothing in it could
be recognised. `AlteredTextCache` listens, by LlamaIndex's instrumentation, to what response synthesizers are given, and
registers the texts that are unknown: the first prompt that holds one computes its cache, and later ones reuse it. It
only ever makes texts known. Which of them stand in a prompt is still found in the prompt itself, so interleaved
streams, threads and tasks cannot mix each other's up.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode

from prophetkv_rag.errors import ContextWindowError, InputError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.integrations.llama_index.llm import ProphetKVLLM

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.vector_stores import CachingEngine

logger = logging.getLogger(__name__)

_LISTENING: weakref.WeakSet[AlteredTextCache] = weakref.WeakSet()


class AlteredTextCache:
    """While it is open, node texts that reach a synthesizer of this model are cached on first use.

    ```python
    with AlteredTextCache(llm, max_texts=500):
        ...  # query engines with postprocessors that alter text
    ```

    **Bounded.** Of the texts, the `max_texts` used last are kept; the caches of the others are deleted. Deleting or
    replacing a document through `ProphetKVChromaVectorStore` deletes what was made of it, too.

    **Not shared.** Only synthesizers that answer with this very engine are listened to, and its index alone learns the
    texts. Whoever asks through one engine can tell, by the time an answer takes, whether a text was cached through it:
    give each tenant an engine with a store of its own (engines on one model share its weights).

    Texts with the tool output of an agent do not pass through a synthesizer and are not seen.

    Args:
        llm: The model; its engine is what counts, so copies of it are listened to as well.
        max_texts: Most texts that are kept.
        name: Tells several apart whose engines share a store: what one of them drops, the others keep.
    """

    def __init__(self, llm: ProphetKVLLM, *, max_texts: int = 1000, name: str = "default") -> None:
        if max_texts < 1:
            msg = f"max_texts is {max_texts}; it must be at least 1"
            raise InputError(msg)
        self.engine: ProphetKVEngine = llm.engine
        self.max_texts = max_texts
        self.owner = f"llama-index-altered/{name}/{self.engine.identity.fingerprint[:16]}"
        self._lock = threading.Lock()
        around_fork(self, "_lock")
        # Key -> ids of the nodes and documents it came from; the text used last comes last.
        self._sources: OrderedDict[str, set[str]] = OrderedDict()
        self._handler = _SynthesisListener(self)

    def __len__(self) -> int:
        return len(self._sources)

    def __enter__(self) -> AlteredTextCache:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Begin to listen. What an earlier process left in a persistent store under this name is dropped first."""
        root = get_dispatcher()
        if self._handler in root.span_handlers:
            return
        left_over = set(self.engine.store.references(self.owner)) - set(self._sources)
        self.engine.remove_chunks(sorted(left_over), owner=self.owner)
        _LISTENING.add(self)
        root.add_span_handler(self._handler)

    def close(self) -> None:
        """Stop listening, and drop every text and cache."""
        root = get_dispatcher()
        root.span_handlers[:] = [handler for handler in root.span_handlers if handler is not self._handler]
        _LISTENING.discard(self)
        self.clear()

    def clear(self) -> None:
        """Drop every text and cache; those seen from now on are kept again."""
        with self._lock:
            self._drop(list(self._sources))

    def forget(self, ids: Iterable[str]) -> None:
        """Drop what was made of the nodes and documents with these ids."""
        gone = set(ids)
        with self._lock:
            self._drop([key for key, sources in self._sources.items() if sources & gone])

    def see(self, nodes: Iterable[Any]) -> None:
        """Register the texts of nodes (with or without scores) as far as they are unknown. Runs no model."""
        with self._lock:
            for item in nodes:
                node = getattr(item, "node", item)
                text = node.get_content(metadata_mode=MetadataMode.NONE)
                sources = {str(source) for source in (node.node_id, node.ref_doc_id) if source}
                try:
                    key = self.engine.library.register(text, owner=self.owner) or self._key_of(text)
                except ContextWindowError as error:
                    logger.info("a node's text gets no KV cache: %s", error)
                    continue
                if key is not None:
                    self._sources.setdefault(key, set()).update(sources)
                    self._sources.move_to_end(key)
            self._drop(list(self._sources)[: -self.max_texts])

    def _key_of(self, text: str) -> str | None:
        """Return the key of a text that is registered here already."""
        key = self.engine.identity.key(self.engine.library.tokens.chunk(text.strip())) if text.strip() else None
        return key if key in self._sources else None

    def _drop(self, keys: list[str]) -> None:
        for key in keys:
            del self._sources[key]
        if keys:
            self.engine.remove_chunks(keys, owner=self.owner)


def forget_altered(engine: CachingEngine, ids: Iterable[str] | None) -> None:
    """Drop what listening caches of this engine hold of these nodes and documents; `None` for all of it."""
    for cache in list(_LISTENING):
        if cache.engine is engine:
            cache.clear() if ids is None else cache.forget(ids)


class _SynthesisListener(BaseSpanHandler[Any]):
    """Hands on the nodes of every `synthesize` and `asynthesize` call of one engine's synthesizers."""

    _cache: Any = PrivateAttr(default=None)

    def __init__(self, cache: AlteredTextCache) -> None:
        super().__init__(open_spans={}, completed_spans=[], dropped_spans=[], current_span_ids={})
        self._cache = weakref.ref(cache)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def new_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        parent_span_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at a call that begins; no span is kept."""
        cache = self._cache()
        nodes = bound_args.arguments.get("nodes")
        if cache is None or not nodes or not isinstance(instance, BaseSynthesizer):
            return
        llm = instance._llm.llm if isinstance(instance._llm, StructuredLLM) else instance._llm
        if getattr(llm, "_engine", None) is not cache.engine:
            return
        try:
            cache.see(nodes)
        except Exception:  # an accelerator must not break a query; LlamaIndex would swallow it without a word
            logger.warning("texts of retrieved nodes could not be registered", exc_info=True)

    def prepare_to_exit_span(self, id_: str, bound_args: inspect.BoundArguments, **kwargs: Any) -> None:
        """Nothing is kept that would have to be ended."""

    def prepare_to_drop_span(self, id_: str, bound_args: inspect.BoundArguments, **kwargs: Any) -> None:
        """Nothing is kept that would have to be ended."""
