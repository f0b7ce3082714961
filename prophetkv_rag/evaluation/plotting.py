"""matplotlib, where it is installed: `pip install "prophetkv-rag[bench]"`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prophetkv_rag.errors import InputError


def load_pyplot() -> Any:
    """Return `matplotlib.pyplot`, set to draw into files; `InputError` if it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        msg = "plots need matplotlib; install it with: pip install 'prophetkv-rag[bench]'"
        raise InputError(msg) from error
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def colours_of(strategies: Sequence[str]) -> dict[str, Any]:
    """Return one colour a strategy."""
    palette = load_pyplot().get_cmap("tab10" if len(strategies) <= 10 else "tab20")
    return {name: palette(index % palette.N) for index, name in enumerate(strategies)}
