"""What `bench ttft` prints for people."""

from __future__ import annotations

from typing import Any

from prophetkv_rag.cli.console import results


def print_tables(report: dict[str, Any]) -> None:
    """Print the report that `--json` prints, as tables and sentences."""
    from rich.table import Table

    console = results()
    table = Table(title="Time to first token against full prefill, medians")
    columns = (
        "context",
        "strategy",
        "full s",
        "s",
        "sooner (min-max)",
        "limit",
        "of it",
        "of 1/p",
        "disk adds",
        "decode",
    )
    _add_columns(table, columns, left=1)
    for row in report["ttft"]:
        table.add_row(
            str(row["context_tokens"]),
            _label(row),
            f"{row['full_prefill_s']:.2f}",
            f"{row['ram_s']:.2f}",
            _spread(row, "speedup_ram"),
            f"{row['limit']:.2f}",
            f"{row['share_of_limit']:.0%}",
            f"{row['share_of_ratio']:.0%}" if row["recompute_ratio"] else "",
            f"{row['disk_overhead']:.0%}",
            f"{row['decode_ratio']:.2f}",
        )
    console.print(table)
    console.print(
        "s: caches in RAM; limit: full prefill's arithmetic over that of the rows that were run; p: the ratio; decode: "
        "speed after reuse over that after full prefill"
    )
    _print_peers(report)
    _print_stages(report)
    _print_growth(report)
    index = report["index"]
    console.print(
        f"indexing: {index['index_tokens_per_s']:.0f} tokens/s, {index['share_of_raw']:.0%} of raw batched prefill "
        f"({index['raw_tokens_per_s']:.0f} tokens/s)"
    )
    for row in report["memory"]:
        console.print(
            f"peak memory at {row['context_tokens']} tokens, {row['strategy']}: "
            f"{row['reused']['peak'] / 2**20:.0f} MiB, {row['peak_ratio']:.2f} times full prefill's "
            f"({row['full_prefill']['peak'] / 2**20:.0f} MiB)"
        )
    console.print(", ".join(f"{key} {value}" for key, value in report["conditions"].items()))


def _print_peers(report: dict[str, Any]) -> None:
    """Print what else was measured on the same prompts, and what was not."""
    from rich.table import Table

    console = results()
    if report["peers"]:
        table = Table(title="Peers on the same token ids, medians")
        _add_columns(table, ("context", "peer", "s", "sooner (min-max)", "first token"), left=1)
        for row in report["peers"]:
            token = "the same" if row["same_first_token"] else "another"
            table.add_row(
                str(row["context_tokens"]), row["peer"], f"{row['seconds']:.2f}", _spread(row, "speedup"), token
            )
        console.print(table)
    for line in report["left_out"]:
        console.print(f"not measured: {line}", markup=False, highlight=False)


def _print_stages(report: dict[str, Any]) -> None:
    from rich.table import Table

    console = results()
    table = Table(title="Where the time goes, seconds (medians, caches in RAM; load_disk, load_ahead: instead of load)")
    _add_columns(table, ("context", "strategy", *report["ttft"][0]["stages_s"]), left=1)
    for row in report["ttft"]:
        values = (f"{value:.3f}" for value in row["stages_s"].values())
        table.add_row(str(row["context_tokens"]), _label(row), *values)
    console.print(table)
    console.print(
        "load_disk: from a warm disk; load_ahead: the same when reading began as the collection answered the query, "
        "with no time between that and the prompt. Given the following time, nothing is left: "
        + ", ".join(f"{row['background_s']:.3f} s at {row['context_tokens']} tokens" for row in report["loading"])
    )


def _print_growth(report: dict[str, Any]) -> None:
    """Print the cost per extra context token, if there is more than one context."""
    from rich.table import Table

    if not report["cost_per_token"]:
        return
    console = results()
    table = Table(title="Cost of one more context token, caches in RAM")
    columns = ("context", "strategy", "full ms", "ms", "times less", "full Mflop", "Mflop", "full rises", "rises")
    _add_columns(table, columns, left=1)
    for row in report["cost_per_token"]:
        table.add_row(
            f"{row['from_tokens']} to {row['to_tokens']}",
            _label(row),
            f"{row['full_ms']:.2f} ({row['full_ms_low']:.2f}-{row['full_ms_high']:.2f})",
            f"{row['ms']:.2f} ({row['ms_low']:.2f}-{row['ms_high']:.2f})",
            "" if row["times_less"] is None else f"{row['times_less']:.2f}",
            f"{row['full_mflop']:.1f}",
            f"{row['mflop']:.1f}",
            *("" if row[name] is None else f"{row[name]:+.3f}" for name in ("full_ms_rise", "ms_rise")),
        )
    console.print(table)
    console.print(
        "rises: how much more that is, in ms, per 1,000 tokens of context; in brackets: between the rounds' extremes"
    )


def _add_columns(table: Any, names: tuple[str, ...], *, left: int) -> None:
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number == left else "right")


def _spread(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f} ({row[f'{name}_min']:.2f}-{row[f'{name}_max']:.2f})"


def _label(row: dict[str, Any]) -> str:
    ratio = row["recompute_ratio"]
    return str(row["strategy"]) if ratio == 0 else f"{row['strategy']} {ratio:.0%}"
