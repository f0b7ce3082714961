"""What the commands need from other packages, and in one line what keeps it from being loaded here."""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.extras import needs
from prophetkv_rag.home import require_home


@dataclass(frozen=True, slots=True)
class Frameworks:
    """LlamaIndex, and our classes for it."""

    index: Any
    vector_store: Any
    embedding: Any
    prompt_template_of: Any
    set_global_tokenizer: Any


def import_chromadb() -> Any:
    """Import chromadb.

    Raises:
        InputError: If this system is none that Chroma runs on.
    """
    require_home("Chroma")
    try:
        import chromadb
    except RuntimeError as error:  # as for an SQLite that is too old; with colours, and over several lines
        reason = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
        msg = (
            f"Chroma does not run with this Python, whose SQLite is {sqlite3.sqlite_version}: {reason} A newer Python "
            "(python.org, conda, uv) brings a newer SQLite"
        )
        raise InputError(msg) from error
    return chromadb


def import_frameworks() -> Frameworks:
    """Import everything that a database is opened with.

    Raises:
        InputError: If something is not installed, or does not run here.
    """
    import_chromadb()
    with needs("llama-index", "llama_index.core", what="this command"):
        from llama_index.core import VectorStoreIndex, set_global_tokenizer
    from prophetkv_rag.integrations.llama_index import (
        MiniLMEmbedding,
        ProphetKVChromaVectorStore,
        prompt_template_of,
    )

    return Frameworks(
        VectorStoreIndex, ProphetKVChromaVectorStore, MiniLMEmbedding, prompt_template_of, set_global_tokenizer
    )
