"""`prophetkv-rag bench ...`: a module for each command, what `ttft` prints, and the conditions that all tell."""

from __future__ import annotations

import typer

from prophetkv_rag.cli.bench import formats, kernels, load, quality, reuse, store, ttft

app = typer.Typer(help="Measure speed and fidelity on your own machine, model and data.", no_args_is_help=True)
app.command()(ttft.ttft)
app.command()(quality.quality)
app.command()(kernels.kernels)
app.command()(formats.formats)
app.command()(store.store)
app.command()(load.load)
app.command()(reuse.reuse)
