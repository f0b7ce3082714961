"""The program `prophetkv-rag`: its commands, and how errors end it."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from prophetkv_rag.cli import ask, bench, cache, calibrate, demo, doctor, index, on_ray, serve
from prophetkv_rag.cli.console import PROGRAM, print_error, take_any_text
from prophetkv_rag.errors import ProphetKVError

USER_ERROR = 2
INTERRUPTED = 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

app = typer.Typer(
    name=PROGRAM,
    help="Answer questions from your documents with a local model, reusing the KV caches of retrieved chunks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(cls=on_ray.IndexCommand)(index.index)
app.command()(ask.ask)
app.command()(demo.demo)
app.command()(doctor.doctor)
app.command()(serve.serve)
app.command()(calibrate.calibrate)
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"{PROGRAM} {version('prophetkv-rag')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0, 1 (an answer of no), 2 (bad input, said in one line), 130.

    Args:
        arguments: What follows the program's name; by default the process's own.
    """
    take_any_text()
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except ProphetKVError as error:
        print_error(str(error))
        return USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        print_error(f"{error.strerror}: {error.filename or 'the output cannot be written'}")
        return USER_ERROR
    except Exception as error:
        # The command line's own errors (unknown option, value out of range) have no public base class in typer.
        explain = getattr(error, "format_message", None)
        if explain is None:
            raise
        print_error(explain())
        return USER_ERROR
    if status == INTERRUPTED:  # newer versions of typer say so by their status
        if arguments is None:  # a second Ctrl-C, while the process ends, ends it at once
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        print_error("interrupted")
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
