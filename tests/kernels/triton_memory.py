"""Where the kernels read and write, and proof that these tests would notice: planted bugs. In the interpreter only."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

from prophetkv_rag.kernels import ops, switch, triton
from prophetkv_rag.kernels.triton import attention, gather, launch, logits, row_moves, scatter, scores
from prophetkv_rag.kernels.triton.tiles import Tile
from tests.kernels.interpreter import MemoryFault, repair, sanitizer
from tests.kernels.oracle import NAN, SCORE_TOLERANCE, TOLERANCE, Case, error
from tests.kernels.triton_cases import GATHER, SCATTER, check_gather, check_scatter

repair()
TILE = Tile(32, 32, 4, 1)
ON_ONE_SHAPE = {"heads": 8, "kv_heads": 2, "rows": 19, "keys": 133, "dim": 64, "dtype": torch.float16}


def check_attention(module, splits=1, **options):
    case = Case(**(ON_ONE_SHAPE | options))
    lse = torch.full((case.heads, case.rows), NAN)
    with sanitizer():
        found = module.selected_rows_attention(
            case.inputs(), case.value, sinks=case.sink_logits, lse=lse, tile=TILE, splits=splits
        )
    truth, true_lse, _ = case.attention()
    assert error(found, truth) < TOLERANCE[case.dtype]
    assert error(lse, true_lse) < 1e-5


def check_scores(module, **options):
    cases = [Case(**(ON_ONE_SHAPE | options), seed=seed) for seed in (0, 1)]
    mass, truth = torch.zeros(2, 133), torch.zeros(133, dtype=torch.float64)
    for case in cases:
        with sanitizer():
            lse = module.log_sum_exp(case.inputs(), tile=TILE, splits=2)
            module.add_query_scores(case.inputs(), mass, lse, tile=TILE)
        truth += case.attention()[2].sum(dim=(0, 1))
    assert error(mass.sum(0), truth) < SCORE_TOLERANCE


def check_rows(gather, scatter):
    """By way of `ops`, with these modules' launchers in place of the shipped ones."""
    with pytest.MonkeyPatch.context() as patch, ops.force("triton"):
        patch.setattr(triton, "rope_gather", gather.rope_gather)
        patch.setattr(triton, "rope_scatter", scatter.rope_scatter)
        for setting in (GATHER[6], GATHER[10], GATHER[14]):
            check_gather(setting, around=sanitizer)
        with sanitizer():
            check_scatter(SCATTER[2])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 31, "sinks": True},
        {"hidden": True, "softcap": 5.0},
        {"rows": 1, "splits": 3},
        {"dim": 80, "heads": 14},
        {"span": 500, "window": 120},
    ],
    ids=str,
)
def test_attention_stays_inside(options):
    check_attention(attention, **options)


@pytest.mark.parametrize("options", [{}, {"window": 31}, {"hidden": True}, {"span": 500, "window": 120}], ids=str)
def test_scores_stay_inside(options):
    check_scores(scores, **options)


def test_rows_stay_inside():
    check_rows(gather, scatter)


def mutated(module, old: str, new: str, folder: Path):
    """The module with one piece of its source replaced."""
    source = Path(module.__file__).read_text("utf-8")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    path = folder / f"mutated_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new), "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def planted(original, old: str, new: str, folder: Path):
    """The modules of kernels, those that hold or import the replaced piece loaded anew."""
    changed = {original: mutated(original, old, new, folder)}
    for module in (attention, scores, gather, scatter):
        for source, copy in list(changed.items()):
            line = f"from {source.__name__} import"
            if module not in changed and line in Path(module.__file__).read_text("utf-8"):
                changed[module] = mutated(module, line, f"from {copy.__name__} import", folder)
    return [changed.get(module, module) for module in (attention, scores, gather, scatter)]


FIRST_ROW = "packed_rows(tile * BLOCK_ROWS,"
BUGS = {
    "a row does not see itself": (logits, "(key <= last_key)", "(key < last_key)"),
    "too many keys without a mask": (attention, "(lowest + 1) // BLOCK_KEYS", "(lowest + BLOCK_KEYS) // BLOCK_KEYS"),
    "no rescaling": (attention, "total * rescale[:, None], input", "total, input"),
    "wrong head": (
        logits,
        "head = kv_head * GROUPS + packed % GROUPS",
        "head = kv_head + packed % GROUPS * tl.num_programs(1)",
    ),
    "a store without its mask": (
        attention,
        "mask=valid[:, None] & (value_channel",
        "mask=(valid | True)[:, None] & (value_channel",
    ),
    "values of the tail not masked": (
        attention,
        "value_offsets, in_range[:, None]",
        "value_offsets, (in_range | True)[:, None]",
    ),
    # The numbers come out right: two programs compute the same row. Only the race check sees it.
    "tiles overlap": (attention, FIRST_ROW, FIRST_ROW.replace("BLOCK_ROWS", "(BLOCK_ROWS - 1)")),
}
MORE_BUGS = {
    "layers overwrite each other": (scores, "before + total", "total + 0 * before"),
    "a row tile skips": (scores, "* GROUPS\n    total", "* (GROUPS - 1)\n    total"),
    "log-sum-exp of one part only": (attention, "torch.logsumexp(parts, dim=0)", "parts[0]"),
    "a scored row does not see itself": BUGS["a row does not see itself"],
    "scores of the wrong head": BUGS["wrong head"],
    "fp8 loses its sign": (row_moves, "((code & 0x80) << 8) | ", ""),
    "a scale of another row": (gather, 'src_row if SCALE == "row"', 'src_row + 1 if SCALE == "row"'),
    "lows of another head": (gather, "lows + scale_row,", "lows,"),
    "values' lows in place of keys'": (gather, "tl.load(source + 4 + PART)", "tl.load(source + 5)"),
    "a row's low left out": (
        row_moves,
        "number + tl.load(low_ptr + scale_rows",
        "number + 0 * tl.load(low_ptr + scale_rows",
    ),
    "a low of the first half's channels": (
        row_moves,
        "number + tl.load(low_ptr + channels",
        "number + tl.load(low_ptr + channels % (STOP // 2)",
    ),
    "low under the scale": (
        row_moves,
        "number = number * tl.load(scale_ptr + channels, mask=in_head, other=0.0).to(tl.float32)[None, :]",
        "number = (number + 1) * tl.load(scale_ptr + channels, mask=in_head, other=0.0).to(tl.float32)[None, :]",
    ),
    "rows go to their own index": (scatter, "target * dst_stride_row", "(row + 0 * target) * dst_stride_row"),
}
GATHERED_BUGS = {
    "causal by the row's position": (launch, '"last_ptr": last_keys', '"last_ptr": inputs.blocks.rows'),
    "a window of so many gathered keys": (logits, "(key >= first_key)", "(key > last_key - 120)"),
    "a window that begins late": (attention, "seen_from // BLOCK_KEYS", "(seen_from // BLOCK_KEYS + 1)"),
}
CAUGHT = (AssertionError, InterpreterError, MemoryFault)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_of_attention_are_caught(name, tmp_path):
    module, *_ = planted(*BUGS[name], tmp_path)
    with pytest.raises(CAUGHT) as caught:
        check_attention(module)
    expected = {"a store without its mask": "outside every tensor", "tiles overlap": "two programs write one address"}
    assert expected.get(name, "") in str(caught.value)


@pytest.mark.parametrize("name", GATHERED_BUGS)
def test_planted_bugs_with_gathered_keys_are_caught(name, tmp_path):
    module, *_ = planted(*GATHERED_BUGS[name], tmp_path)
    with pytest.raises(CAUGHT):
        check_attention(module, span=500, window=120)


@pytest.mark.parametrize("name", MORE_BUGS)
def test_planted_bugs_of_the_others_are_caught(name, tmp_path):
    original, old, new = MORE_BUGS[name]
    _, scoring, *moving = planted(original, old, new, tmp_path)
    with pytest.raises(CAUGHT):
        check_rows(*moving) if original in (gather, scatter, row_moves) else check_scores(scoring)


def test_the_sanitizer_sees_races_and_undefined_lanes(tmp_path):
    """Of the tools themselves: a read of what another program writes, and a masked load with no other value."""
    path = tmp_path / "racy.py"
    path.write_text(
        "import triton\nimport triton.language as tl\n"
        "@triton.jit\n"
        "def shift(x_ptr, n):\n"
        "    i = tl.program_id(0)\n"
        "    tl.store(x_ptr + i, tl.load(x_ptr + (i + 1) % n))\n"
        "@triton.jit\n"
        "def tail(x_ptr, y_ptr, n):\n"
        "    i = tl.arange(0, 8)\n"
        "    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n))\n"
    )
    spec = importlib.util.spec_from_file_location("racy", path)
    racy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(racy)
    with sanitizer(), pytest.raises(InterpreterError, match="another"):
        racy.shift[(4,)](torch.zeros(4), 4)
    out = torch.zeros(8)
    racy.tail[(1,)](torch.ones(8), out, 5)
    assert out[:5].eq(1).all()
    assert out[5:].isnan().all()


def test_the_switch_says_why_not():
    case = Case(4, 2, 3, 9, 300)
    reasons = []
    with pytest.MonkeyPatch.context() as patch, ops.force("triton"):
        patch.setattr(switch, "say_once", reasons.append)
        ops.selected_rows_attention(
            case.query, case.key.nan_to_num(), case.value.nan_to_num(), case.blocks(), scaling=1.0
        )
    assert reasons == ["head dim 300 is above 256"]
