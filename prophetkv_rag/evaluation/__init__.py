"""Measuring quality and speed on one's own machine and data; what `bench` and `calibrate` print comes from here.

In come an engine, data and settings; out come rows, tables and plots. Begin
reading with `quality/` (distance to full prefill), `speed/` (time to first token, kernels, memory), `storage/` (blobs,
loading, the store under load) or `tasks/` (where prompts come from).
"""

from prophetkv_rag.evaluation.plotting import load_pyplot

__all__ = ["load_pyplot"]
