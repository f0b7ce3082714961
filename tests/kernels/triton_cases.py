"""The kernels against float64: run by `test_triton_interpreter.py` (in a process of its own) and, on a GPU, by itself.

TRITON_INTERPRET=1 pytest tests/kernels/triton_cases.py          # PROPHETKV_WIDE=1 for every combination
pytest tests/kernels/triton_cases.py                             # on a machine with a GPU
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from prophetkv_rag.kernels import ops, switch
from prophetkv_rag.kernels.triton.tiles import Tile
from tests.kernels.oracle import NAN, SCORE_TOLERANCE, TOLERANCE, Case, error, rotated

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDE = os.environ.get("PROPHETKV_WIDE") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
if IS_INTERPRETED:
    from tests.kernels.interpreter import repair

    repair()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _only_triton(monkeypatch):
    """Triton or an error; and what a launcher allocates is full of NaN until a kernel writes it."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def poisoned(tensor):
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poisoned(empty_like(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poisoned(new_empty(*args, **kwargs)))

    def refuse(reason):
        raise AssertionError(reason)

    monkeypatch.setattr(switch, "say_once", refuse)
    with ops.force("triton"):
        yield


# heads, kv heads, rows, keys, dim; then dtype and options
ATTENTION = [
    (4, 1, 1, 1, 64, F32, {}),
    (4, 1, 1, 1, 64, BF16, {"window": 1}),
    (8, 2, 1, 77, 64, F16, {}),
    (2, 2, 19, 133, 64, BF16, {}),
    (8, 2, 19, 133, 64, F32, {}),
    (7, 1, 19, 133, 64, BF16, {"window": 31}),
    (8, 1, 40, 64, 64, F16, {"hidden": True}),
    (14, 2, 19, 133, 80, F32, {"softcap": 5.0}),
    (8, 2, 19, 133, 96, BF16, {"sinks": True}),
    (8, 2, 40, 190, 128, BF16, {}),
    (8, 1, 19, 133, 128, F16, {}),
    (7, 1, 40, 190, 128, F32, {"window": 40, "hidden": True, "softcap": 5.0, "sinks": True}),
    (8, 8, 7, 65, 256, F32, {}),
    (8, 2, 19, 133, 256, BF16, {"hidden": True, "sinks": True}),
    (6, 3, 19, 70, 72, F32, {"value_dim": 40}),
    (4, 2, 33, 50, 16, F16, {"window": 7}),
    (8, 2, 40, 133, 64, BF16, {"span": 500}),
    (7, 1, 19, 190, 128, F32, {"span": 400, "window": 60, "hidden": True, "sinks": True}),
    (9, 3, 33, 70, 64, F32, {"span": 3000, "window": 900}),
]
if WIDE:
    ATTENTION += [
        (groups * 2, 2, rows, keys, dim, dtype, options)
        for groups, (rows, keys), dim, dtype, options in itertools.product(
            (1, 4, 7, 8), ((1, 1), (1, 77), (19, 133), (40, 64)), (64, 80, 96, 128, 256), (F32, F16, BF16),
            ({}, {"window": 9, "sinks": True}, {"hidden": True, "softcap": 5.0}),
        )
    ]  # fmt: skip


def case_of(shape, seed=0) -> Case:
    *sizes, dtype, options = shape
    return Case(*sizes, dtype=dtype, seed=seed, device=DEVICE, **options)


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention(shape):
    case = case_of(shape)
    truth, true_lse, _ = case.attention()
    lse = torch.full((case.heads, case.rows), NAN, device=DEVICE)
    found = ops.selected_rows_attention(
        case.query, case.key, case.value, case.blocks(), **case.settings, sinks=case.sink_logits, lse=lse
    )
    assert error(found, truth) < TOLERANCE[case.dtype]
    assert error(lse, true_lse) < 1e-6
    assert found.dtype == case.dtype


TILES = [
    (Tile(16, 16, 4, 1), 1),
    (Tile(16, 32, 4, 1), 3),
    (Tile(64, 16, 4, 1), 5),
    (Tile(128, 64, 4, 1), 2),
]


@pytest.mark.parametrize(
    "options", [{}, {"window": 60, "sinks": True}, {"hidden": True}, {"span": 700, "window": 200}], ids=str
)
@pytest.mark.parametrize(("tile", "splits"), TILES, ids=str)
def test_attention_by_any_tiles_and_splits(tile, splits, options):
    from prophetkv_rag.kernels.triton import selected_rows_attention

    case = case_of((14, 2, 30, 230, 64, F32, options), seed=1)
    truth, true_lse, _ = case.attention()
    lse = torch.full((case.heads, case.rows), NAN, device=DEVICE)
    found = selected_rows_attention(
        case.inputs(), case.value, sinks=case.sink_logits, lse=lse, tile=tile, splits=splits
    )
    assert error(found, truth) < TOLERANCE[F32]
    assert error(lse, true_lse) < 1e-6


@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_that_sees_nothing_is_zero(splits):
    """All its keys are hidden; the parts of a split softmax then have nothing to be shares of."""
    from prophetkv_rag.kernels.triton import selected_rows_attention

    case = case_of((8, 2, 5, 400, 64, F32, {"hidden": True}), seed=2)
    case.hidden_keys[: case.positions[1] + 1] = True
    truth, _, _ = case.attention()
    lse = torch.full((case.heads, case.rows), NAN, device=DEVICE)
    found = selected_rows_attention(case.inputs(), case.value, lse=lse, tile=Tile(16, 32, 4, 1), splits=splits)
    assert bool((found[:2] == 0).all())
    assert bool(lse[:, :2].isneginf().all())
    assert error(found[2:], truth[2:]) < TOLERANCE[F32]


@pytest.mark.parametrize("splits", [1, 3])
def test_log_sum_exps_with_sinks(splits):
    from prophetkv_rag.kernels.triton import log_sum_exp

    case = case_of((8, 2, 19, 133, 64, F32, {"sinks": True, "window": 200}))
    lse = log_sum_exp(case.inputs(), sinks=case.sink_logits, tile=Tile(16, 16, 4, 1), splits=splits)
    assert error(lse, case.attention()[1]) < 1e-6


def test_what_lies_scattered_in_memory_is_refused():
    """The kernels know no strides of these: a view would be written to the wrong places."""
    case = case_of((8, 2, 19, 133, 64, F32, {}))
    wide = torch.zeros(case.heads, 2 * case.rows, device=DEVICE)
    with pytest.raises(ValueError, match=r"lse must be contiguous; it is \[8, 19\] with strides \[38, 2\]"):
        ops.selected_rows_attention(case.query, case.key, case.value, case.blocks(), **case.settings, lse=wide[:, ::2])
    lse, mass = torch.zeros(case.heads, case.rows, device=DEVICE), torch.zeros(2, 140, device=DEVICE)
    for given, said in (
        (mass[:, :133], "mass must be contiguous"),
        (mass, r"mass is \[2, 140\]; it must be \[2, 133\]"),
    ):
        with pytest.raises(ValueError, match=said):
            ops.add_query_scores(given, case.query, case.key, lse, case.blocks(), **case.settings)


SCORES = [
    (4, 1, 1, 1, 64, F32, {}),
    (8, 2, 1, 77, 64, BF16, {}),
    (7, 1, 19, 133, 64, F16, {"window": 31}),
    (8, 2, 19, 133, 128, BF16, {"sinks": True}),
    (8, 2, 19, 133, 96, F32, {"hidden": True}),
    (14, 2, 40, 190, 64, F32, {"softcap": 5.0, "sinks": True, "window": 60}),
    (8, 1, 7, 65, 256, BF16, {"hidden": True}),
    (2, 2, 19, 133, 80, F32, {}),
    (8, 2, 19, 133, 64, F32, {"span": 400, "window": 150}),
]
if WIDE:
    SCORES += ATTENTION[19:]


@pytest.mark.parametrize("context_softmax", [True, False])
@pytest.mark.parametrize("shape", SCORES, ids=str)
def test_attention_and_scores(shape, context_softmax):
    case = case_of(shape)
    truth, _, _ = case.attention()
    true_mass = case.mass(context_softmax)
    before = torch.rand(case.kv_heads, case.keys, device=DEVICE) * 1e-3
    total = before.clone()
    found = ops.attend_and_score(
        case.query, case.key, case.value, case.blocks(), mass=total,
        context=case.context, scoring_rows=case.asking, context_softmax=context_softmax,
        **case.settings, sinks=case.sink_logits,
    )  # fmt: skip
    assert torch.equal(total[:, ~case.context], before[:, ~case.context])
    mass = (total - before).sum(0) / (case.heads * int(case.asking.sum()))
    assert error(found, truth) < TOLERANCE[case.dtype]
    if float(true_mass.norm()) > 0:
        assert error(mass, true_mass) < SCORE_TOLERANCE
    else:
        assert float(mass.abs().max()) == 0.0
    assert float(mass[~case.context].abs().sum()) == 0.0
    wanted = max(1, case.keys // 5)
    assert top(mass.cpu().double(), wanted) == top(true_mass, wanted)


def top(scores: torch.Tensor, number: int) -> set[int]:
    """What a selection by score takes; of equal scores (those of keys outside the context are 0) the first."""
    return set(scores.sort(descending=True, stable=True).indices[:number].tolist())


@pytest.mark.parametrize("splits", [1, 4])
def test_layers_add_up_in_place(splits):
    """Two layers into one buffer, from the log-sum-exps of the kernel that exists for models that give none."""
    from prophetkv_rag.kernels.triton import log_sum_exp

    cases = [case_of((8, 2, 19, 300, 64, BF16, {}), seed=seed) for seed in (1, 2)]
    mass = torch.zeros(2, 300, device=DEVICE)
    truth = torch.zeros(300, dtype=torch.float64)
    for case in cases:
        _, true_lse, weights = case.attention()
        lse = log_sum_exp(case.inputs(), splits=splits)
        assert error(lse, true_lse) < 1e-6
        ops.add_query_scores(mass, case.query, case.key, lse, case.blocks(), **case.settings)
        truth += weights.sum(dim=(0, 1))
    assert error(mass.sum(0), truth) < SCORE_TOLERANCE


# stored as, scale of keys, scale of values, dim, rotated pairs, interleaved, value dim, written as
GATHER = [
    (F32, None, None, 64, 32, False, 64, F32),
    (BF16, None, None, 128, 64, False, 128, BF16),
    (F16, None, None, 256, 128, False, 256, F16),
    (BF16, None, None, 80, 16, True, 80, BF16),
    (F32, None, None, 96, 48, True, 40, F32),
    (F32, None, None, 64, 0, False, 64, F32),
    (torch.int8, "channel", "row", 128, 64, False, 128, BF16),
    (torch.int8, "row", "row", 96, 48, False, 96, F32),
    (torch.int8, "channel", "channel", 80, 40, True, 64, F16),
    (torch.float8_e4m3fn, None, None, 64, 32, False, 64, BF16),
    (torch.float8_e4m3fn, "row", "channel", 128, 64, False, 128, F32),
    (torch.uint8, "channel", "row", 72, 12, True, 72, F32),
    ("affine", "channel", "row", 128, 64, False, 128, BF16),
    ("affine", "channel", "row", 64, 32, False, 64, F32),
    ("affine", "channel", "row", 80, 16, True, 40, F16),
    ("affine", "row", "channel", 96, 24, False, 96, F32),
]


def stored(shape, dtype, scale, generator):
    """Rows as a store keeps them, their scale and low, and the float64 numbers they stand for."""
    if dtype == torch.int8:
        rows = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    elif dtype == "affine":
        rows = torch.randint(0, 256, shape, generator=generator, dtype=torch.int64).to(torch.uint8)
    elif dtype in (torch.uint8, torch.float8_e4m3fn):
        codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.int64)
        codes = torch.where(codes % 128 == 127, codes - 1, codes)  # all but the two NaN codes, subnormals included
        rows = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        rows = torch.randn(shape, generator=generator).to(dtype)
    meant = rows.double()
    factor = low = None
    if scale is not None:
        size = (shape[0], shape[1], 1) if scale == "row" else (shape[0], 1, shape[2])
        factor = (torch.rand(size, generator=generator) / 64 + 1e-3).to(F16 if scale == "row" else F32)
        meant = meant * factor.double()
        if dtype == "affine":
            low = (torch.randn(size, generator=generator) - 1).to(factor.dtype)
            meant = meant + low.double()
    return (rows.view(dtype) if dtype == torch.uint8 else rows), factor, low, meant


@pytest.mark.parametrize("setting", GATHER, ids=str)
def test_gather(setting):
    check_gather(setting)


def check_gather(setting, *, around=None):
    dtype, key_scale, value_scale, dim, half, interleaved, value_dim, out_dtype = setting
    generator = torch.Generator().manual_seed(3)
    heads, lengths, starts, capacity = 2, (33, 1, 70), (5, 40, 50), 130
    angles = torch.rand(sum(lengths), half, generator=generator, dtype=torch.float64) * 7 - 3
    cos, sin = angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)
    key_out = torch.full((heads, capacity, dim), NAN, dtype=out_dtype)
    value_out = torch.full((heads, capacity, value_dim), NAN, dtype=out_dtype)
    true_key, true_value, first, sources = key_out.double(), value_out.double(), 0, []
    for index, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        keys, key_factor, key_low, meant_keys = stored((heads, length, dim), dtype, key_scale, generator)
        values, value_factor, value_low, meant_values = stored(
            (heads, length, value_dim), dtype, value_scale, generator
        )
        if half:
            meant_keys = rotated(meant_keys, angles[first : first + length], interleaved=interleaved)
        true_key[:, start : start + length] = meant_keys
        true_value[:, start : start + length] = meant_values
        if index == 2:  # one whose rows do not begin where wide loads could
            odd = torch.zeros(keys.numel() + 1, dtype=torch.uint8 if keys.element_size() == 1 else keys.dtype)
            odd = odd.view(keys.dtype)
            odd[1:] = keys.ravel()
            keys = odd.to(DEVICE)[1:].view(keys.shape)
        source = ops.RowSource(keys, values, key_factor, value_factor, key_low, value_low)
        sources.append(source.to(torch.device(DEVICE)))
        first += length
    key_out, value_out = key_out.to(DEVICE), value_out.to(DEVICE)
    tables = (cos, sin) if half else (None, None)
    if around is None:
        ops.rope_gather(key_out, value_out, sources, starts, *tables, interleaved=interleaved)
    else:  # the kernel finds the sources by their addresses
        sources = [source.as_plain() for source in sources]
        with around(*(tensor for source in sources for tensor in source if tensor is not None)):
            ops.rope_gather(key_out, value_out, sources, starts, *tables, interleaved=interleaved)
    filled = torch.zeros(capacity, dtype=torch.bool)
    for length, start in zip(lengths, starts, strict=True):
        filled[start : start + length] = True
    assert error(key_out.cpu()[:, filled], true_key[:, filled]) < TOLERANCE[out_dtype]
    assert error(value_out.cpu()[:, filled], true_value[:, filled]) < TOLERANCE[out_dtype]
    assert bool(key_out.cpu()[:, ~filled].isnan().all())
    assert bool(value_out.cpu()[:, ~filled].isnan().all())


@pytest.mark.parametrize(
    ("stored_as", "scale", "low", "said"),
    [
        (torch.uint8, None, (2, 1, 16), "beside no scale and torch.uint8"),
        (torch.uint8, (2, 1, 16), (2, 9, 1), r"key_low is \[2, 9, 1\] beside a scale of \[2, 1, 16\]"),
        (torch.float8_e4m3fn, (2, 1, 16), (2, 1, 16), "it needs integers"),
    ],
    ids=str,
)
def test_a_low_that_fits_nothing_is_refused(stored_as, scale, low, said):
    rows = torch.zeros(2, 9, 16, dtype=torch.uint8).view(stored_as)
    source = ops.RowSource(rows, rows, None if scale is None else torch.ones(scale), None, torch.ones(low))
    out = torch.zeros(2, 20, 16, device=DEVICE)
    with pytest.raises(ValueError, match=said):
        ops.rope_gather(out, out.clone(), [source.to(out.device)], [3], None, None)


# heads, kv heads, rows, dim, rotated pairs (0: rotated already), interleaved, dtype, batch
SCATTER = [
    (8, 2, 1, 64, 32, False, F32, 1),
    (4, 1, 45, 128, 64, False, BF16, 1),
    (7, 1, 45, 80, 16, True, F16, 2),
    (9, 3, 33, 64, 0, False, BF16, 1),
    (2, 2, 70, 256, 128, False, F32, 1),
    (0, 2, 45, 96, 48, True, BF16, 1),
]


@pytest.mark.parametrize("setting", SCATTER, ids=str)
def test_scatter(setting):
    check_scatter(setting)


def check_scatter(setting):
    heads, kv_heads, num_rows, dim, half, interleaved, dtype, batch = setting
    generator = torch.Generator().manual_seed(4)

    def fresh(number):
        rows = torch.randn(batch, num_rows, number, dim, generator=generator)
        return rows.to(dtype).to(DEVICE).transpose(1, 2)

    query, key, value = fresh(heads) if heads else None, fresh(kv_heads), fresh(kv_heads)
    rows = torch.randperm(num_rows * 2, generator=generator)[:num_rows].to(DEVICE)
    angles = torch.rand(num_rows, half, generator=generator, dtype=torch.float64) * 7 - 3
    tables = {"cos": angles.cos().float().to(DEVICE), "sin": angles.sin().float().to(DEVICE)} if half else {}
    before = torch.randn(2, batch, kv_heads, num_rows * 2 + 3, dim, generator=generator).to(dtype).to(DEVICE)
    key_out, value_out = before.clone()
    turned = ops.rope_scatter(key, value, rows, key_out, value_out, query=query, interleaved=interleaved, **tables)
    untouched = torch.ones(before.shape[3], dtype=torch.bool, device=DEVICE)
    untouched[rows] = False
    for out, old in zip((key_out, value_out), before, strict=True):
        assert torch.equal(out[:, :, untouched], old[:, :, untouched])
    assert torch.equal(value_out[:, :, rows], value)
    true_key = rotated(key.cpu(), angles, interleaved=interleaved)
    assert error(key_out[:, :, rows], true_key) < TOLERANCE[dtype]
    if query is None:
        assert turned is None
    else:
        assert error(turned, rotated(query.cpu(), angles, interleaved=interleaved)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(5, 64), (3, 5, 64), (2, 3, 5, 64)], ids=str)
def test_rotate(shape):
    states = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    angles = torch.rand(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) * 6
    cos, sin = angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)
    found = ops.rotate(states.to(DEVICE), cos, sin, interleaved=False)
    assert error(found, rotated(states, angles, interleaved=False)) < TOLERANCE[F32]
