"""matplotlib, where it is installed: `pip install "prophetkv-rag[bench]"`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prophetkv_rag.extras import needs


def load_pyplot() -> Any:
    """Return `matplotlib.pyplot`, set to draw into files; `MissingExtraError` if it is not installed."""
    with needs("bench", "matplotlib", what="drawing plots"):
        import matplotlib as mpl
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def colours_of(strategies: Sequence[str]) -> dict[str, Any]:
    """Return one colour a strategy."""
    palette = load_pyplot().get_cmap("tab10" if len(strategies) <= 10 else "tab20")
    return {name: palette(index % palette.N) for index, name in enumerate(strategies)}
