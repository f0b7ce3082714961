"""The kernels as shipped compile for GPUs that are not there, without spills, inside their shared memory.

The interpreter accepts much that the compiler rejects. In a process of its own, see `aot.py`. PROPHETKV_WIDE=1 compiles
every entry of the tile tables with every option (ten minutes).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

from prophetkv_rag.kernels.triton import attention, gather, scatter, scores, tiles

HERE = Path(__file__).parent
LIMITS = json.loads((HERE / "compiled_limits.json").read_text("utf-8"))
WIDE = os.environ.get("PROPHETKV_WIDE") == "1"
PLAIN = {"dtype": "bf16", "dim": 128, "groups": 4}
SMALL = {"dtype": "fp16", "dim": 64, "groups": 1}
EVERYTHING = {"window": True, "hidden": True, "softcap": True, "sinks": True, "lse": True}
ATTENTION_FLAGS = ({}, {"hidden": True, "lse": True}, {"window": True, "softcap": True, "sinks": True, "lse": True})


def jobs(target: str) -> list[tuple[str, str, dict[str, object]]]:
    chosen: list[tuple[str, dict[str, object]]] = [
        ("attention", PLAIN),
        ("attention", {"dtype": "fp16", "dim": 64, "groups": 7, **EVERYTHING}),
        ("scores", {**PLAIN, "hidden": True}),
        ("scores", {**SMALL, "window": True}),
        ("log_sum_exp", {**SMALL, "window": True}),
        ("attention", {**SMALL, "window": True, "lse": True}),
        ("log_sum_exp", {**PLAIN, "hidden": True}),
        ("log_sum_exp", {"dtype": "fp32", "dim": 128, "groups": 4}),  # as a second loop, without a mask, it spilled
        ("attention", {"dtype": "fp32", "dim": 256, "groups": 4, "hidden": True, "lse": True}),
        (
            "gather",
            {"dtype": "bf16", "source": "int8", "dim": 128, "scale": "channel", "half": 64, "scale_type": "fp32"},
        ),
        ("gather", {"dtype": "bf16", "source": "uint8", "dim": 128, "scale": "channel", "half": 64, "low": True}),
        ("gather", {"dtype": "fp16", "source": "uint8", "dim": 128, "scale": "row", "half": 32, "interleaved": True}),
        ("gather", {"dtype": "bf16", "source": "uint8", "dim": 256, "scale": "channel", "half": 128}),
        ("scatter", {"dtype": "bf16", "dim": 128, "half": 64}),
    ]
    if WIDE:
        for _, size, dim in (entry for entry in tiles.ATTENTION if entry[0] == target):
            base = {"dtype": "bf16" if size == 2 else "fp32", "dim": dim, "groups": 4}
            chosen += [("attention", {**base, **flags}) for flags in (*ATTENTION_FLAGS, EVERYTHING)]
            chosen += [(kind, {**base, "hidden": True}) for kind in ("scores", "log_sum_exp")]
            chosen.append(("log_sum_exp", base))
        for dim, half in ((64, 32), (80, 16), (96, 48), (256, 128)):
            for source in ("bf16", "fp16", "fp32", "int8", "uint8"):
                chosen.append(
                    ("gather", {"dtype": "bf16", "source": source, "dim": dim, "scale": "none", "half": half})
                )
            for low in (True, False):  # as the store writes int8 and fp8
                packed = {"dtype": "bf16", "source": "uint8", "dim": dim, "scale": "channel", "half": half, "low": low}
                chosen.append(("gather", packed))
            chosen.append(("scatter", {"dtype": "bf16", "dim": dim, "half": half}))
    return [(kind, target, options) for kind, options in chosen]


@pytest.mark.parametrize("target", tiles.TARGETS)
def test_shipped_configurations_compile_well(target):
    cache = Path(tempfile.gettempdir()) / f"prophetkv-triton-{os.getuid()}"  # compiled once per version of the source
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    wanted = jobs(target)
    command = [sys.executable, "-P", str(HERE / "aot.py"), json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000 if WIDE else 500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(wanted)
    broken = [row for row in rows if not_well(*row)]
    assert broken == []


def test_no_length_of_a_prompt_is_compiled_in():
    """Else every new length, or every second, would wait for the compiler inside its query."""
    kernels = (
        attention.attention_kernel,
        scores.scores_kernel,
        gather.gather_kernel,
        scatter.scatter_kernel,
    )
    # What is left: the model's own shape, the tile, and a multiple of the tile.
    allowed = {"scaling", "softcap", "keys_per_split"}
    for kernel in kernels:
        compiled_in = {
            param.name
            for param in kernel.params
            if not (
                param.is_constexpr or param.do_not_specialize or "_stride_" in param.name or param.name[-4:] == "_ptr"
            )
        }
        assert compiled_in <= allowed, kernel.__name__
        assert not {param.name for param in kernel.params if param.is_constexpr and "num" in param.name.lower()}


def not_well(kind, target, options, found) -> bool:
    """Whether what came out is over a limit. fp32 products are exact, so on NVIDIA they are not matrix instructions."""
    has_matrix = options["dtype"] != "fp32" or target == "gfx942"
    needed = LIMITS["matrix_instructions"].get(kind, {}).get(target, 0) if has_matrix else 0
    wide = (
        LIMITS["wide_loads"].get(kind, {}).get(target, 0)
        if options["dim"] == 128 and not options.get("interleaved")
        else 0
    )
    return (
        found["shared"] > LIMITS["shared_bytes"][target]
        or found["spilled"] > LIMITS["spilled_bytes"][target]
        or found["registers"] > LIMITS["registers"][target]
        or found["matrix"] < needed
        or found["wide_loads"] < wide
    )


def test_a_bad_tile_is_noticed():
    """The limits can be broken: the tiles that another version of Triton, or another GPU, could not hold."""
    found = {"shared": 65536, "spilled": 0, "registers": 200, "matrix": 64, "wide_loads": 20}
    assert not not_well("attention", "gfx942", PLAIN, found)
    for name, value in (("shared", 81920), ("spilled", 6), ("registers", 513), ("matrix", 0)):
        assert not_well("attention", "gfx942", PLAIN, found | {name: value})
