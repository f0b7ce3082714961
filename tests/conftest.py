"""What every test may rely on, however pytest was started."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Let Ctrl+C be heard: a shell starts its background jobs deaf to it, and what tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
