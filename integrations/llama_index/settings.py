"""LlamaIndex's global settings, brought in line with a model: explicit, and only when called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core import Settings
from llama_index.core.node_parser import SentenceSplitter

from prophetkv_rag.errors import InputError

if TYPE_CHECKING:
    from prophetkv_rag.integrations.llama_index.llm import ProphetKVLLM

DEFAULT_CHUNK_SIZE = 256
SMALLEST_CHUNK_SIZE = 16


def configure(llm: ProphetKVLLM, *, chunk_size: int | None = None, chunk_overlap: int = 0) -> None:
    """Set `Settings.llm`, `Settings.tokenizer` and `Settings.chunk_size` for this model, for the whole process.

    LlamaIndex counts tokens with the tokenizer of an OpenAI model unless it is told otherwise. Text that this model
    needs more tokens for (code, numbers, other languages) then passes LlamaIndex's check and is refused by the model
    (`CallRefusedError`). With the model's own tokenizer, prompts are packed to its real window and chunks have the
    length that they are said to have.

    What was made before keeps its settings: call it first, and again for another model. `Settings.node_parser` is
    replaced if it is a `SentenceSplitter` (the default) and otherwise keeps its kind.

    Args:
        llm: The model to answer with by default.
        chunk_size: Tokens in a chunk, metadata included; by default 256, or an eighth of a window below 2,048.
        chunk_overlap: Tokens that neighbouring chunks share. They are cached twice, so it is 0 by default.

    Raises:
        InputError: If the chunks would not fit the window, or overlap by a whole chunk.
    """
    window = llm.metadata.context_window
    if chunk_size is None:
        chunk_size = max(SMALLEST_CHUNK_SIZE, min(DEFAULT_CHUNK_SIZE, window // 8))
    if not SMALLEST_CHUNK_SIZE <= chunk_size < window:
        msg = f"chunk_size is {chunk_size}; it must be from {SMALLEST_CHUNK_SIZE} to below the model's window, {window}"
        raise InputError(msg)
    if not 0 <= chunk_overlap < chunk_size:
        msg = f"chunk_overlap is {chunk_overlap}; it must be from 0 to below chunk_size, {chunk_size}"
        raise InputError(msg)
    tokenize = llm.engine.library.tokens.chunk  # locked; the engine's tokenizer may be at work in other threads
    Settings.llm = llm
    Settings.tokenizer = tokenize
    Settings.prompt_helper = None  # made from the model that was set before; each synthesizer now makes its own
    Settings.chat_prompt_helper = None
    _set_chunk_size(chunk_size, chunk_overlap, tokenize)


def _set_chunk_size(chunk_size: int, chunk_overlap: int, tokenize: Any) -> None:
    old = Settings.node_parser
    if type(old) is not SentenceSplitter:
        if hasattr(old, "chunk_size"):
            old.chunk_size = chunk_size
        return
    steps = Settings.transformations
    # A splitter keeps the tokenizer that it was made with.
    Settings.node_parser = SentenceSplitter(chunk_size=chunk_size, chunk_overlap=chunk_overlap, tokenizer=tokenize)
    Settings.transformations = [Settings.node_parser if step is old else step for step in steps]
