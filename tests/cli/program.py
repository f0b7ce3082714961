"""Helpers of the command line's tests: how a run of the program looks from a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]


def index_tiny(run: Run, docs: Path, *more: object) -> dict[str, Any]:
    report: dict[str, Any] = run("index", docs, "--chunk-size", 64, "--json", *more)
    return report
