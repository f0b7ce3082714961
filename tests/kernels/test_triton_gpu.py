"""The same tests on a GPU, where there is one."""

from __future__ import annotations

import re

import pytest
import torch

from tests.kernels.test_triton_interpreter import run_pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


@pytest.mark.parametrize(("name", "at_least"), [("triton_cases.py", 75), ("triton_engine.py", 9)])
def test_on_the_gpu(name, at_least):
    output = run_pytest(name, TRITON_INTERPRET="0")
    assert int(re.search(r"(\d+) passed", output)[1]) >= at_least
