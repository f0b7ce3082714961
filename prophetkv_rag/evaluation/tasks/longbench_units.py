"""Where the context of a LongBench row is cut: at the units that the official rows have, and nothing is lost."""

from __future__ import annotations

import re

_PASSAGE, _PARAGRAPH = r"^Passage \d+:", r"^Paragraph \d+:"
_UNIT_STARTS = {
    "hotpotqa": _PASSAGE,
    "2wikimqa": _PASSAGE,
    "musique": _PASSAGE,
    "multi_news": _PASSAGE,
    "dureader": r"^文章\s*\d+",
    "passage_count": _PARAGRAPH,
    "passage_retrieval_en": _PARAGRAPH,
    "passage_retrieval_zh": r"^段落\s*\d+",
    "trec": r"^Question:",
    "triviaqa": r"^Passage:",
    "samsum": r"^Dialogue:",
    "lsht": r"^新闻",
    "repobench-p": r"^\S+\.(?:py|java)\r?$",  # a file's path, on a line of its own
}
"""What a document, or an example of a few-shot task, begins with."""

_SENTENCE = r"(?:(?<=[.!?]\s)|(?<=[.!?][)\"”’]\s))(?<![A-Z]\.\s)(?=[^\W\d_a-z]|[\"“‘(])|(?<=[。！？])(?![。！？])"  # noqa: RUF001
_BOUNDARIES = (r"(?<=\n\n)(?!\n)", r"(?<=\n)", _SENTENCE)
"""Paragraphs, lines, sentences (not behind a lone capital, as in U.S.): some reports are a single line."""


def split_context(task: str, context: str) -> tuple[str, ...]:
    """Cut before each document or example; a context without two of them at the coarsest boundary that it has.

    Args:
        task: An official name, that of LongBench-E included.
        context: A row's context.

    Returns:
        Units that give the context when joined; none is blank, unless the context is.
    """
    start = _UNIT_STARTS.get(task.removesuffix("_e"))
    for boundary in ((f"(?={start})",) if start else ()) + _BOUNDARIES:
        units = _with_text(re.split(boundary, context, flags=re.MULTILINE))
        if len(units) > 1:
            return tuple(units)
    return (context,) if context else ()


def _with_text(pieces: list[str]) -> list[str]:
    """Join blank pieces to the one before them, and those at the beginning to the first that is not."""
    units: list[str] = []
    for piece in pieces:
        if units and not (piece.strip() and units[-1].strip()):
            units[-1] += piece
        elif piece:
            units.append(piece)
    return units
