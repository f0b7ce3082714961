"""Run in a process of its own: compile kernels for GPUs that are not there, and print what came out, one JSON a line.

    python -m tests.kernels.aot '[["attention", "sm_90", {"dtype": "bf16", "dim": 128, "groups": 4}], ...]'

A process that has loaded Triton's interpreter cannot compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prophetkv_rag.kernels.triton import tiles
from prophetkv_rag.kernels.triton.attention import attention_kernel
from prophetkv_rag.kernels.triton.gather import gather_kernel
from prophetkv_rag.kernels.triton.scatter import scatter_kernel
from prophetkv_rag.kernels.triton.scores import scores_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16, "int8": tl.int8, "uint8": tl.uint8}
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
NOT_DIVISIBLE = set(tiles.PROMPT_SIZES)
"""Any number may come; strides, split sizes and pointers are multiples of 16 in practice."""


def build(fn: Any, target: str, pointers: dict[str, str], constants: dict[str, Any], tile: tiles.Tile) -> Any:
    signature, attrs = {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            signature[name] = f"*{pointers[name]}"
        elif name in ("scaling", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
        if name not in NOT_DIVISIBLE and signature[name] != "fp32":
            attrs[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=TARGETS[target], options=options)


def attention_constants(dim: int, groups: int, tile: tiles.Tile, **flags: bool) -> dict[str, Any]:
    return {
        "GROUPS": groups, "HAS_WINDOW": flags.get("window", False), "HAS_HIDDEN": flags.get("hidden", False),
        "HAS_SOFTCAP": flags.get("softcap", False), "PRECISION": "ieee",
        "DIM": dim, "BLOCK_DIM": tiles.padded_head(dim), "BLOCK_ROWS": tile.block_rows, "BLOCK_KEYS": tile.block_keys,
    }  # fmt: skip


def attention(
    target: str, dtype: str, dim: int, groups: int, tile: Any = None, table: Any = tiles.ATTENTION, **flags: bool
) -> Any:
    tile = tiles.Tile(*tile) if tile else table[target, SIZES[dtype], max(64, tiles.padded(dim))]
    value_dim = dim if table is tiles.ATTENTION else 0
    constants = attention_constants(dim, groups, tile, **flags) | {
        "HAS_SINKS": flags.get("sinks", False), "HAS_LSE": flags.get("lse", False),
        "VALUE_DIM": value_dim, "BLOCK_VALUE": tiles.padded_head(value_dim),
    }  # fmt: skip
    pointers = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "out_ptr", "sinks_ptr"), dtype)
    pointers |= {"last_ptr": "i64", "first_ptr": "i64", "hidden_ptr": "u8", "lse_ptr": "fp32"}
    return build(attention_kernel, target, pointers, constants, tile)


def scores(target: str, dtype: str, dim: int, groups: int, tile: Any = None, **flags: bool) -> Any:
    tile = tiles.Tile(*tile) if tile else tiles.SCORES[target, SIZES[dtype], max(64, tiles.padded(dim))]
    pointers = {"query_ptr": dtype, "key_ptr": dtype, "last_ptr": "i64", "first_ptr": "i64", "lse_ptr": "fp32"}
    pointers |= {"hidden_ptr": "u8", "bounds_ptr": "i64", "mass_ptr": "fp32"}
    constants = attention_constants(dim, groups, tile, **flags)
    return build(scores_kernel, target, pointers, constants, tile)


def log_sum_exp(target: str, dtype: str, dim: int, groups: int, tile: Any = None, **flags: bool) -> Any:
    """The kernel of attention without values."""
    return attention(target, dtype, dim, groups, tile, tiles.LOG_SUM_EXP, lse=True, **flags)


def rows(dim: int) -> tiles.Tile:
    return tiles.Tile(tiles.ROW_TILE, 0, tiles.row_warps(dim), 3)


def gather(
    target: str,
    dtype: str,
    source: str,
    dim: int,
    scale: str,
    half: int,
    interleaved: bool = False,
    low: bool = False,
    scale_type: str = "fp16",
) -> Any:
    constants = {
        "KEY_TYPE": DTYPES[source], "VALUE_TYPE": DTYPES[source], "KEY_SCALE": scale,
        "VALUE_SCALE": "none" if scale == "none" else "row",
        "KEY_SCALE_TYPE": DTYPES[scale_type], "VALUE_SCALE_TYPE": DTYPES[scale_type],
        "HAS_KEY_LOW": low, "HAS_VALUE_LOW": low, "IS_ALIGNED": True,
        "IS_KEY_FP8": source == "uint8" and not low, "IS_VALUE_FP8": source == "uint8" and not low,
        "DIM": dim, "VALUE_DIM": dim, "HALF": half, "BLOCK_HALF": tiles.padded(half),
        "BLOCK_REST": tiles.padded(dim - 2 * half), "BLOCK_VALUE": tiles.padded(dim), "INTERLEAVED": interleaved,
        "TILE": tiles.ROW_TILE,
    }  # fmt: skip
    pointers = {"source_ptr": "i64", "tile_ptr": "i64", "key_ptr": dtype, "value_ptr": dtype}
    pointers |= {"cos_ptr": "fp32", "sin_ptr": "fp32"}
    return build(gather_kernel, target, pointers, constants, rows(dim))


def scatter(target: str, dtype: str, dim: int, half: int, heads: int = 32, kv_heads: int = 8) -> Any:
    constants = {
        "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "VALUE_DIM": dim, "HALF": half,
        "BLOCK_HALF": tiles.padded(half), "BLOCK_REST": tiles.padded(dim - 2 * half),
        "BLOCK_VALUE": tiles.padded(dim), "INTERLEAVED": False, "TILE": tiles.ROW_TILE,
    }  # fmt: skip
    fn = scatter_kernel
    pointers = {name: dtype for name in fn.arg_names if name.endswith("_ptr")}
    pointers |= {"rows_ptr": "i64", "cos_ptr": "fp32", "sin_ptr": "fp32"}
    return build(fn, target, pointers, constants, rows(dim))


def facts(compiled: Any, target: str) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and matrix instructions, read off the machine code."""
    found = {"shared": compiled.metadata.shared}
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
        # Scalar registers spill into lanes of vector registers, not into memory.
        return found | {
            "registers": numbers["vgpr_count"],
            "spilled": numbers["vgpr_spill_count"] + numbers["private_segment_fixed_size"],
            "scalar_spilled": numbers["sgpr_spill_count"],
            "matrix": len(re.findall(r"\bv_mfma_", text)),
            "wide_loads": len(re.findall(r"global_load_dwordx4|buffer_load_dwordx4", text)),
        }
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.check_output([tools / "cuobjdump", "--dump-resource-usage", path], text=True)
        sass = subprocess.check_output([tools / "cuobjdump", "--dump-sass", path], text=True)
    return found | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "matrix": len(re.findall(r"\bHGMMA|\bHMMA", sass)),
        "wide_loads": len(re.findall(r"\bLD\w*\S*\.128", sass)),
    }


def main() -> None:
    kinds = {"attention": attention, "scores": scores, "log_sum_exp": log_sum_exp, "gather": gather, "scatter": scatter}
    for kind, target, options in json.loads(sys.argv[1]):
        print(json.dumps([kind, target, options, facts(kinds[kind](target, **options), target)]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
