"""What the commands show, and where: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "prophetkv-rag"


def print_json(value: Any) -> None:
    """Print one JSON document on standard output: all that a command given `--json` prints there."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


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
        yield _quarters(console, description, total)
        return
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)


def _quarters(console: Console, description: str, total: int) -> Callable[[int], None]:
    """Progress for logs: a line at the start and one at each quarter."""
    console.print(f"{description} ({total})", markup=False)
    done = 0

    def advance(steps: int) -> None:
        nonlocal done
        before, done = done, done + steps
        if total and before * 4 // total < done * 4 // total:
            console.print(f"{description}: {done} of {total}", markup=False)

    return advance


def quiet_libraries() -> None:
    """Keep transformers' bars and notices, and HTTP clients' request lines, out of our output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("httpx", "httpx2", "chromadb", "llama_index"):
        logging.getLogger(name).setLevel(logging.WARNING)
