"""What both frameworks need of us and neither has: streams for async callers, vector stores with caches."""

from prophetkv_rag.integrations.shared.async_stream import iterate_in_thread, last_item
from prophetkv_rag.integrations.shared.framework import Call, Framework, Settings
from prophetkv_rag.integrations.shared.wrapping import wrap

__all__ = ["Call", "Framework", "Settings", "iterate_in_thread", "last_item", "wrap"]
