"""The two tables of docs/vector_stores.md, as data."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "vector_stores.md"


def rows_of(page: Path, framework: str) -> dict[str, list[str]]:
    """Return the cells of each row behind its first, by that first one."""
    text = page.read_text("utf-8").partition(f"<!-- {framework} table -->")[2].partition("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in text.strip().splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[1:]}
