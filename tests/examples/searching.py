"""A model that was taught to search a chatbot's documents, and the one that it finds."""

from __future__ import annotations

from pathlib import Path

from tests.integrations.taught import CALL, Lesson, teach

ASKED = "When does the museum open?"
MUSEUM = "The museum opens at ten o'clock on Monday, and the library beside it opens at nine o'clock every day. " * 3


def save_taught(directory: Path, system: str) -> Path:
    """Write a tiny model that answers `ASKED` by a search; `system` is the agent's prompt. Returns `directory`."""
    call = "I look.\n" + CALL % ("search_documents", '{"query": "museum"}')
    engine = teach([Lesson(ASKED, {"search_documents": ("query",)}, call, system=system)])
    engine.model.save_pretrained(directory)
    engine.tokenizer.save_pretrained(directory)
    return directory
