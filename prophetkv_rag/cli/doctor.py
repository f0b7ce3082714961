"""`prophetkv-rag doctor MODEL`: whether a model's caches can be re-positioned, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from prophetkv_rag.cli.console import print_json, quiet_libraries, results, status
from prophetkv_rag.cli.model_choice import DeviceOption, DtypeOption, chosen_model, load_options
from prophetkv_rag.cli.vllm_engine import VLLM_ARGS_HELP, before_vllm, check_engine, refuse_with_vllm
from prophetkv_rag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from prophetkv_rag.model import ModelSupport


def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or name.")],
    engine: Annotated[
        str, typer.Option(metavar="ENGINE", help="Who runs the model: transformers, or vllm.")
    ] = "transformers",
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    vllm_args: Annotated[str | None, typer.Option(metavar="JSON", help=VLLM_ARGS_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Load MODEL, measure how its layers treat positions, and say whether its chunk caches can be reused.

    Exit status: 0 for a supported model, 1 for one that is refused, 2 for one that cannot be loaded.
    """
    quiet_libraries()
    is_vllm, arguments = check_engine(engine, vllm_args)
    if is_vllm:
        refuse_with_vllm(
            ("--dtype", dtype is not None, "give dtype in --vllm-args"),
            ("--device", device != "auto", "give its own settings in --vllm-args"),
        )
        _probe_in_vllm(model, arguments, as_json)
        return
    from prophetkv_rag.kernels import ops
    from prophetkv_rag.model import load_model, probe_model

    load = load_options(dtype, device)
    name = chosen_model(model)  # shows a status of its own, and a terminal has room for one
    with status(f"loading {model}") as tell:
        loaded, _ = load_model(name, **load)
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
    _print_support(model, support, str(loaded.device), ops.in_use(loaded.device), as_json)


def _probe_in_vllm(model: str, arguments: dict[str, Any], as_json: bool) -> None:
    before_vllm()
    from prophetkv_rag.integrations.vllm import probe_in_vllm
    from prophetkv_rag.kernels import ops

    name = chosen_model(model)
    with status(f"loading {model} in vLLM"):
        try:
            support, device = probe_in_vllm(name, arguments)
        except UnsupportedModelError as error:
            _print_refusal(model, str(error), as_json)
            raise typer.Exit(1) from None
    import torch

    _print_support(model, support, device, ops.in_use(torch.device(device)), as_json)


def _print_support(model: str, support: ModelSupport, device: str, kernels: str, as_json: bool) -> None:
    report = {
        "model": model,
        "supported": True,
        "model_type": support.model_type,
        "context_window": support.context_window,
        "dtype": support.dtype,
        "device": device,
        "kernels": kernels,
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
