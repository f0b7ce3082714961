"""What both frameworks need of us and neither has: streams for async callers."""

from prophetkv_rag.integrations.shared.async_stream import iterate_in_thread, last_item

__all__ = ["iterate_in_thread", "last_item"]
