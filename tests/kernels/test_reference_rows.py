"""The PyTorch implementations that the kernels stand beside: held to the same cases, and to float64."""

from __future__ import annotations

import pytest
import torch

from prophetkv_rag.kernels import ops, switch
from tests.kernels.oracle import SCORE_TOLERANCE, TOLERANCE, Case, error
from tests.kernels.triton_cases import ATTENTION, DEVICE, GATHER, SCATTER, SCORES, case_of, check_gather, check_scatter


@pytest.fixture(autouse=True)
def _only_pytorch():
    with ops.force("reference"):
        yield


@pytest.mark.parametrize("setting", GATHER, ids=str)
def test_gather(setting):
    check_gather(setting)


@pytest.mark.parametrize("setting", SCATTER, ids=str)
def test_scatter(setting):
    check_scatter(setting)


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_and_its_log_sum_exps(shape):
    case = case_of(shape)
    truth, true_lse, _ = case.attention()
    lse = torch.full((case.heads, case.rows), float("nan"), device=DEVICE)
    found = ops.selected_rows_attention(
        case.query, case.key, case.value, case.blocks(), **case.settings, sinks=case.sink_logits, lse=lse
    )
    assert error(found, truth) < TOLERANCE[case.dtype]
    assert error(lse, true_lse) < 1e-6


@pytest.mark.parametrize("context_softmax", [True, False])
@pytest.mark.parametrize("shape", SCORES, ids=str)
def test_scores_in_two_steps(shape, context_softmax):
    """Log-sum-exps, then column sums: the mass that `attend_and_score` finds in one."""
    case = case_of(shape)
    context = case.context if context_softmax else None
    sinks = {} if context_softmax or case.sink_logits is None else {"sinks": case.sink_logits}
    lse = ops.log_sum_exp(case.query, case.key, case.blocks(), **case.settings, context=context, **sinks)
    lse.masked_fill_(lse.isneginf() | ~case.asking, float("inf"))
    mass = torch.zeros(case.kv_heads, case.keys, device=DEVICE)
    ops.add_query_scores(mass, case.query, case.key, lse, case.blocks(), **case.settings, context=case.context)
    truth = case.mass(context_softmax) * case.heads * int(case.asking.sum())
    assert error(mass.sum(0), truth) < SCORE_TOLERANCE or float(truth.norm()) == 0.0


def test_layers_add_up_in_place():
    mass, truth = torch.zeros(2, 60, device=DEVICE), torch.zeros(60, dtype=torch.float64)
    for seed in (1, 2):
        case = Case(4, 2, 9, 60, 16, seed=seed, device=DEVICE)
        lse = ops.log_sum_exp(case.query, case.key, case.blocks(), **case.settings)
        ops.add_query_scores(mass, case.query, case.key, lse, case.blocks(), **case.settings)
        truth += case.attention()[2].sum(dim=(0, 1))
    assert error(mass.sum(0), truth) < SCORE_TOLERANCE


def test_an_unknown_stored_dtype_is_gathered_by_pytorch(monkeypatch):
    said = []
    monkeypatch.setattr(switch, "say_once", said.append)
    keys = torch.ones(1, 2, 16, dtype=torch.float64)
    out = torch.zeros(2, 1, 4, 16)
    ops.rope_gather(out[0], out[1], [ops.RowSource(keys, keys)], [1], None, None)
    assert out[:, 0, :, 0].tolist() == [[0, 1, 1, 0]] * 2
    assert said == []
