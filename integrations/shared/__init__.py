"""What both frameworks need of us and neither has: messages fitted to a chat template, streams for async callers."""

from prophetkv_rag.integrations.shared.async_stream import iterate_in_thread, last_item
from prophetkv_rag.integrations.shared.chat_template import alternate_roles, fit_template

__all__ = ["alternate_roles", "fit_template", "iterate_in_thread", "last_item"]
