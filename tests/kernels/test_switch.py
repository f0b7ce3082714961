"""Which implementation runs, and what is said where none of the GPU's can."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from prophetkv_rag import InputError, ProphetKVEngine
from prophetkv_rag.cli.app import main
from prophetkv_rag.evaluation.speed import kernel_bench
from prophetkv_rag.kernels import ops, reference, switch
from tests.tiny import tiny_llama


def test_tensors_on_a_cpu_take_pytorch(monkeypatch):
    def refuse():
        raise AssertionError("Triton was asked for")

    monkeypatch.setattr(switch, "triton_kernels", refuse)
    assert ops.in_use("cpu") == "pytorch"
    states, table = torch.ones(1, 2, 8), torch.ones(2, 4)
    assert ops.rotate(states, table, table, interleaved=False).shape == states.shape
    with ops.force("reference"):
        assert ops.in_use("cuda") == "pytorch"


def test_tensors_on_a_gpu_take_triton():
    """Asked of a device that need not be there."""
    pytest.importorskip("triton")
    assert ops.in_use("cuda").startswith("triton ")


def test_both_implementations_take_the_same_arguments():
    """Of every operation; `tile` and `splits`, which override what a device suggests, come on top."""
    triton = pytest.importorskip("prophetkv_rag.kernels.triton")
    names = reference.__all__
    assert set(names) == set(triton.__all__) - {"why_not"}
    assert set(names) == set(ops.__all__) - {"CHOICES", "VARIABLE", "RowBlocks", "RowSource", "force", "in_use"}
    for name in names:
        expected = inspect.signature(getattr(reference, name)).parameters
        found = dict(inspect.signature(getattr(triton, name)).parameters)
        for own in ("tile", "splits"):
            found.pop(own, None)
        assert {n: (p.kind, p.default) for n, p in found.items()} == {
            n: (p.kind, p.default) for n, p in expected.items()
        }, name


def test_without_triton_a_gpu_takes_pytorch_and_it_is_said(monkeypatch, caplog):
    switch.triton_kernels.cache_clear()
    monkeypatch.setattr(switch.importlib.util, "find_spec", lambda name: None)
    try:
        assert ops.in_use("cuda") == "pytorch"
        assert ops.in_use("cuda") == "pytorch"
    finally:
        switch.triton_kernels.cache_clear()
    assert [record.message for record in caplog.records] == [
        "triton is not installed: GPU tensors take the PyTorch code, which is slower"
    ]


@pytest.mark.parametrize("choice", ["cuda", "Triton", "reference,"])
def test_a_wrong_choice_is_refused(choice):
    with pytest.raises(ValueError, match="allowed: auto, triton, reference"), ops.force(choice):
        pass


def test_the_variable_is_obeyed_and_checked(monkeypatch):
    monkeypatch.setenv("PROPHETKV_KERNELS", "reference")
    assert ops.in_use("cuda") == "pytorch"
    monkeypatch.setenv("PROPHETKV_KERNELS", "fast")
    with pytest.raises(ValueError, match="PROPHETKV_KERNELS is 'fast'; allowed: auto, triton, reference"):
        ops.in_use("cuda")


def test_bench_kernels_without_a_device(capsys, monkeypatch):
    monkeypatch.setattr(kernel_bench, "has_device", lambda: False)
    assert main(["bench", "kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "not measured: no CUDA or ROCm device"
    assert sum("not measured" in line for line in lines[1:]) == kernel_bench.count_lines(kernel_bench.Shape())
    assert main(["bench", "kernels", "--json", "--context", "2048"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["note"] == "not measured: no CUDA or ROCm device"
    assert report["shape"]["rows"] == 409
    assert all(row["ms"] is None for row in report["kernels"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--heads", "7", "--kv-heads", "2"], "--heads is 7; it must be a multiple of --kv-heads (2)"),
        (["--dtype", "int8"], "allowed: bfloat16, float16, float32"),
        (["--question", "128", "--context", "128"], "it must be less than --context (128)"),
    ],
)
def test_bench_kernels_refuses(arguments, said, capsys):
    assert main(["bench", "kernels", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_wrong_variable_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.VARIABLE, "cuda")
    with pytest.raises(InputError, match="PROPHETKV_KERNELS is 'cuda'; allowed: auto, triton, reference"):
        ProphetKVEngine(tiny_llama(), None)
