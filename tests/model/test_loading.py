"""Loading what cannot be loaded, and telling models apart by everything that decides their keys and values."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import UnknownModelError
from prophetkv_rag.model.fingerprint import model_fingerprint
from prophetkv_rag.model.loading import load_model
from tests.tiny import save_tiny, tiny_llama


def truncate(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def widen(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 100}))


def no_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


@pytest.mark.parametrize("damage", [truncate, widen, no_json])
def test_a_directory_that_does_not_load_is_one_clear_error(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(save_tiny(tmp_path))
    with pytest.raises(UnknownModelError, match=r"cannot load a model from '.*': \S+"):
        load_model(tmp_path)


class Settings:
    """Stands for a `peft` configuration (the package is not installed): a set in it has no order of its own."""

    def __init__(self, **values: Any) -> None:
        self.values = {"target_modules": {"q_proj", "v_proj", "k_proj"}, "inference_mode": True} | values

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


class Adapted(torch.nn.Linear):
    """Stands for a layer of `peft`."""

    disable_adapters = False
    active_adapters = ("default",)
    merged_adapters = ()


def adapted(**changes: Any) -> Any:
    model = tiny_llama()
    model.peft_config = {"default": Settings(**changes.pop("settings", {}))}
    layer = Adapted(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    for name, value in changes.items():
        setattr(layer, name, value)
    model.model.layers[0].self_attn.lora = layer
    return model


def test_adapters_are_part_of_the_identity() -> None:
    base = model_fingerprint(adapted())
    assert model_fingerprint(adapted()) == base
    assert model_fingerprint(adapted(settings={"inference_mode": False})) == base
    different = [
        {"settings": {"lora_alpha": 32}},
        {"active_adapters": ("other",)},
        {"active_adapters": ("default", "other")},
        {"disable_adapters": True},
    ]
    found = {model_fingerprint(adapted(**changes)) for changes in different}
    assert len(found | {base}) == 5


def test_a_model_without_adapters_keeps_its_identity() -> None:
    """Caches on disk stay valid; the value of `peft_config` is `None` or missing."""
    model = tiny_llama()
    before = model_fingerprint(model)
    model.peft_config = None
    assert model_fingerprint(model) == before


def needs_its_own_code(directory: Path) -> None:
    """A folder as of a model on the hub that transformers does not know."""
    file = directory / "config.json"
    own = {"AutoConfig": "conf.MyConfig", "AutoModelForCausalLM": "mod.MyForCausalLM"}
    changes = {"model_type": "mything", "architectures": ["MyForCausalLM"], "auto_map": own}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for name in ("conf", "mod"):
        (directory / f"{name}.py").write_text(f"open({str(directory / 'was_run')!r}, 'w').close()\n")


@pytest.mark.parametrize("answer", ["", "y\n", "n\n"])
def test_a_model_with_code_of_its_own_is_neither_run_nor_asked_about(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_its_own_code(save_tiny(tmp_path))
    typed = io.StringIO(answer)
    monkeypatch.setattr("sys.stdin", typed)
    with pytest.raises(
        UnknownModelError, match=r"needs Python code of its own.*trust_remote_code=True.*ProphetKVEngine"
    ):
        load_model(tmp_path)
    assert typed.tell() == 0
    assert "[y/N]" not in capsys.readouterr().out
    assert not (tmp_path / "was_run").exists()


def test_a_known_model_that_also_has_code_of_its_own_loads_without_it(tmp_path: Path) -> None:
    needs_its_own_code(save_tiny(tmp_path))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "llama"}))
    model, _ = load_model(tmp_path)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "was_run").exists()
