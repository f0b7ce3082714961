"""What the commands show, and where: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from prophetkv_rag.text import well_formed_parts

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "prophetkv-rag"
_LINE_EVERY_S = 60.0


def take_any_text() -> None:
    """Let standard output and error write what their encoding lacks (a redirect on Windows) as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """Print one JSON document on standard output: all that a command given `--json` prints there.

    Where the output's encoding lacks a character, all that is not ASCII is written as JSON's own escapes.
    """
    value = well_formed_parts(value)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    typer.echo(text)


def print_error(message: str) -> None:
    """Print one line on standard error."""
    typer.echo(f"{PROGRAM}: error: {' '.join(message.split())}", err=True)


def results() -> Console:
    """The console of results; no wider than a page, so that long answers stay readable."""
    from rich.console import Console

    console = Console(highlight=False)
    return Console(highlight=False, width=min(console.width, 140) if console.is_terminal else 120)


def progress_console() -> Console:
    """The console of everything that is not a result."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with `message` while the block runs; yields a function that changes the message."""
    console = progress_console()
    if not console.is_terminal:
        console.print(message, markup=False)
        yield lambda text: console.print(text, markup=False)
        return
    with console.status(message) as spinner:
        yield spinner.update


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; yields a function that advances it by a number of steps."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = progress_console()
    if not console.is_terminal:
        yield _lines(console, description, total)
        return
    # Steps may take minutes: the speed is that of the last hour, not of rich's half minute.
    with Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=3600) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)


def _lines(console: Console, description: str, total: int) -> Callable[[int], None]:
    """Progress for logs: a line at the start, one at each quarter, and one a minute, with the time left.

    The first steps told are not timed: they may have been done by an earlier run.
    """
    console.print(f"{description} ({total})", markup=False)
    done, known, begun, said = 0, -1, time.monotonic(), time.monotonic()

    def advance(steps: int) -> None:
        nonlocal done, known, begun, said
        before, done, now = done, done + steps, time.monotonic()
        if known < 0:
            known, begun = done, now
        if total and (before * 4 // total < done * 4 // total or now - said >= _LINE_EVERY_S):
            said = now
            left = ""
            if done > known:
                left = f", about {shown_duration((now - begun) / (done - known) * (total - done))} left"
            console.print(f"{description}: {done} of {total}{left if done < total else ''}", markup=False)

    return advance


def shown_bytes(nbytes: float) -> str:
    """Return "14.2 GB", "310 MB", "45 kB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:,.0f} {unit}" if nbytes >= 100 * size else f"{nbytes / size:.3g} {unit}"
    return f"{nbytes / 1e3:,.0f} kB"


def shown_duration(seconds: float) -> str:
    """Return "40 s", "12 min", "3 h 5 min"."""
    if seconds < 60:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def quiet_libraries() -> None:
    """Keep transformers' bars and notices, and HTTP clients' request lines, out of our output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("httpx", "httpx2", "chromadb", "llama_index"):
        logging.getLogger(name).setLevel(logging.WARNING)
