"""What one prefill did, for people: numbers, the prompt drawn token by token, and spans.

In come counts and tensors that a prefill leaves; out goes a `ReuseReport` that prints itself, draws itself as HTML and
travels as JSON. Begin reading with `report.py`, of which `chunk_report.py` and `timings.py` are parts; `view.py` makes
text of token ids when somebody looks, `html.py` draws it, `tracing.py` tells OpenTelemetry of each stage.
"""

from prophetkv_rag.report.chunk_report import ChunkReport, ChunkStatus, ChunkTier
from prophetkv_rag.report.report import ReuseReport
from prophetkv_rag.report.timings import Timings
from prophetkv_rag.report.tracing import end_stage, trace_generation
from prophetkv_rag.report.view import PromptView, SegmentView, ViewedChunk

__all__ = [
    "ChunkReport",
    "ChunkStatus",
    "ChunkTier",
    "PromptView",
    "ReuseReport",
    "SegmentView",
    "Timings",
    "ViewedChunk",
    "end_stage",
    "trace_generation",
]
