"""`prophetkv-rag cache ...`: looking after the chunk caches of a database. Begin with `opened.py`."""

from __future__ import annotations

import typer

from prophetkv_rag.cli.cache import keys, remote, stats, transfer, upkeep, warm

app = typer.Typer(help="Look at, check and move the KV caches of a database.", no_args_is_help=True)
app.command()(stats.stats)
app.command()(upkeep.verify)
app.command()(upkeep.gc)
app.command()(upkeep.clear)
app.command("new-key")(keys.new_key)
app.command()(warm.warm)
app.command()(remote.push)
app.command()(keys.rekey)
app.command("export")(transfer.export_)
app.command("import")(transfer.import_)
