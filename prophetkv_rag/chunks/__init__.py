"""Index time: the chunks of one model, encoded once and kept in a store.

In come texts; out come their caches, in the store when they are written and loaded when a prompt has them (or computed
again, where the store cannot give them). Begin reading with `library.py` (`opening.py` makes it) and `adding.py`, the
part of it that does not run the model itself; `encode.py` runs the model, `encoder.py` behind other chunks, too
(`placing.py` says which, `order.py` in which order, `recent.py` holds their caches meanwhile), `writer.py` stores while
it runs, `loader.py` brings caches back, and `prompt_loader.py` those of a whole prompt.
"""

from prophetkv_rag.chunks.adding import AddProgress, AddsChunks
from prophetkv_rag.chunks.encode import EncodingPrefix, encode_prefix
from prophetkv_rag.chunks.encoder import ChunkEncoder
from prophetkv_rag.chunks.library import ChunkLibrary
from prophetkv_rag.chunks.loader import Origin
from prophetkv_rag.chunks.opening import open_library
from prophetkv_rag.chunks.order import in_order
from prophetkv_rag.chunks.placing import Placing
from prophetkv_rag.chunks.writer import ChunkWriter, Wanted

__all__ = [
    "AddProgress",
    "AddsChunks",
    "ChunkEncoder",
    "ChunkLibrary",
    "ChunkWriter",
    "EncodingPrefix",
    "Origin",
    "Placing",
    "Wanted",
    "encode_prefix",
    "in_order",
    "open_library",
]
