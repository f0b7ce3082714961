"""A plain generator as an async one; what LangChain's classes use too."""

from prophetkv_rag.integrations.async_stream import iterate_in_thread, last_item

__all__ = ["iterate_in_thread", "last_item"]
