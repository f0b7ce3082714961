"""Devices and dtypes by name, and what Apple's MPS, which nobody has tried, would need: no float64 on the device."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.model import device_of, dtype_of, load_model
from prophetkv_rag.model.devices import in_float64
from tests.tiny import save_tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PATH = ("model", "chunks", "reuse", "prompt", "generation", "conversations", "report")


def test_names() -> None:
    assert [dtype_of(name) for name in ("auto", "bfloat16")] == [None, torch.bfloat16]
    assert [device_of(name) for name in ("auto", "cpu")] == [None, torch.device("cpu")]
    with pytest.raises(InputError, match="the dtype is 'fp8'; allowed: auto, float32, bfloat16, float16"):
        dtype_of("fp8")


@pytest.mark.parametrize("name", ["cuda:97", "mps:0:0", "gpu", "meta", "xpu"])
def test_a_device_that_is_not_here(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"the device is '{name}'; here are: cpu"):
        device_of(name)
    with pytest.raises(InputError, match="here are: cpu"):
        load_model(save_tiny(tmp_path), device=name)


def test_why_a_device_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mps.is_built():
        with pytest.raises(InputError, match="built without MPS, which is for macOS"):
            device_of("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(InputError, match="built without CUDA and ROCm"):
        device_of("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(InputError, match="finds no GPU: is its driver there"):
        device_of("cuda:1")


def test_caches_of_another_dtype_have_another_identity(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    identities = {}
    for name in ("float32", "bfloat16", "float16"):
        model, _ = load_model(path, dtype=dtype_of(name))
        engine = ProphetKVEngine(model, tiny_tokenizer())
        assert engine.identity.dtype == name
        identities[engine.identity.fingerprint] = engine.key_of("The library opens at nine o'clock.")
    assert len(identities) == len(set(identities.values())) == 3


def test_float64_stays_where_it_is_but_on_mps() -> None:
    class OnMps:
        """What of a tensor there `in_float64` may touch."""

        device = torch.device("mps")

        def cpu(self) -> torch.Tensor:
            return torch.ones(2)

    assert in_float64(torch.ones(2, dtype=torch.int64)).dtype == torch.float64
    assert in_float64(OnMps()).device.type == "cpu"  # type: ignore[arg-type]


def test_nothing_else_of_the_path_asks_a_device_for_float64() -> None:
    """MPS raises at the first such number. What is made in float64 by another way than ours is found by its name."""
    files = [path for name in PATH for path in (ROOT / "prophetkv_rag" / name).rglob("*.py")]
    files += list((ROOT / "kernels" / "reference").rglob("*.py"))
    found = {}
    for file in files:
        names = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(node, ast.Attribute) and node.attr in ("float64", "double")
        ]
        if names:
            found[file.name] = names
    assert found == {
        "devices.py": ["torch.float64"],
        "rope.py": ["torch.float64"],  # on the device that `in_float64` gave
        "tolerance.py": ["torch.float64"],  # the key of a table
    }
