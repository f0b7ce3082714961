"""`prophetkv-rag doctor MODEL`: whether a model's caches can be re-positioned, layer by layer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prophetkv_rag.cli.console import print_json, quiet_libraries, results, status
from prophetkv_rag.cli.model_choice import chosen_model
from prophetkv_rag.errors import UnsupportedModelError


def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Load MODEL, measure how its layers treat positions, and say whether its chunk caches can be reused.

    Exit status: 0 for a supported model, 1 for one that is refused, 2 for one that cannot be loaded.
    """
    quiet_libraries()
    from prophetkv_rag.kernels import ops
    from prophetkv_rag.model import load_model, probe_model

    name = chosen_model(model)  # shows a status of its own, and a terminal has room for one
    with status(f"loading {model}") as tell:
        loaded, _ = load_model(name)
        tell(f"probing {model}")
        try:
            support = probe_model(loaded)
        except UnsupportedModelError as error:
            refusal: str | None = str(error)
        else:
            refusal = None
    if refusal is not None:
        _print_refusal(model, refusal, as_json)
        raise typer.Exit(1)
    report = {
        "model": model,
        "supported": True,
        "model_type": support.model_type,
        "context_window": support.context_window,
        "dtype": support.dtype,
        "device": str(loaded.device),
        "kernels": ops.in_use(loaded.device),
        "layers": support.to_rows(),
    }
    if as_json:
        print_json(report)
    else:
        _print(report)


def _print_refusal(model: str, reason: str, as_json: bool) -> None:
    if as_json:
        print_json({"model": model, "supported": False, "reason": reason})
    else:
        results().print(f"{model} is not supported: {reason}", markup=False)


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    rows = report["layers"]
    console = results()
    console.print(
        f"{report['model']} is supported: {report['model_type']}, {len(rows)} layers, "
        f"context window {report['context_window']}, computes in {report['dtype']} on {report['device']} "
        f"(kernels: {report['kernels']})",
        markup=False,
    )
    table = Table()
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "rope" else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
