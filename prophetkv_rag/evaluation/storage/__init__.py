"""What stored caches cost: formats, loading, a corpus larger than the disk, a large catalog.

Begin reading with `formats.py`.
"""

from prophetkv_rag.evaluation.storage.entries import run_entries
from prophetkv_rag.evaluation.storage.formats import demo_prompts, measure_formats
from prophetkv_rag.evaluation.storage.load_times import measure_loading
from prophetkv_rag.evaluation.storage.stream import plot_streams, run_stream

__all__ = ["demo_prompts", "measure_formats", "measure_loading", "plot_streams", "run_entries", "run_stream"]
