"""GGUF files by path, by folder and by a part of their name; a tiny real one, written by the package `gguf`."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prophetkv_rag.cli.model_choice import chosen_model
from prophetkv_rag.errors import UnknownModelError
from prophetkv_rag.evaluation.speed import write_gguf
from prophetkv_rag.model import gguf_files, load_model
from prophetkv_rag.model.gguf_files import gguf_in, one_gguf, repair_tokenizer
from tests.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny_llama`, without a vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "Tiny.F32.gguf"
    write_gguf(tiny_llama(hidden_size=64), path)
    return path


@pytest.fixture
def with_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has no vocabulary to make a tokenizer of."""
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tiny_tokenizer())


@pytest.mark.usefixtures("with_tokenizer")
@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_file_is_loaded_by_its_path_or_its_folder(gguf_file: Path, by: str) -> None:
    model, _ = load_model(gguf_file if by == "file" else gguf_file.parent)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, actual = tiny_llama()(ids).logits, model(ids).logits
    assert torch.allclose(actual, expected, atol=1e-4)


def test_a_folder_with_several_files_or_none(gguf_file: Path, tmp_path: Path) -> None:
    assert gguf_in(tmp_path) is None
    for name in ("a.Q4_K_M.gguf", "a.Q8_0.gguf"):
        shutil.copy(gguf_file, tmp_path / name)
    with pytest.raises(UnknownModelError, match=r"holds 2 \.gguf files; name one of them: a.Q4_K_M.gguf, a.Q8_0.gguf"):
        load_model(tmp_path)
    assert one_gguf(["a.Q4_K_M.gguf", "a.Q8_0.gguf"], "x", "q8_0") == "a.Q8_0.gguf"
    (tmp_path / "config.json").write_text("{}")  # a model in transformers' format, whatever else lies there
    assert gguf_in(tmp_path) is None


def test_names_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["README.md", "m.Q4_K_M.gguf", "m.Q8_0.gguf"]
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info",
        lambda self, name, **_: SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files]),
    )
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: f"/hub/{name}/{file}")
    assert chosen_model("someone/m-GGUF:q4_k") == "/hub/someone/m-GGUF/m.Q4_K_M.gguf"
    with pytest.raises(UnknownModelError, match=r"\(named as someone/m-GGUF:PART\) holds 2 .gguf files"):
        chosen_model("someone/m-GGUF")
    with pytest.raises(UnknownModelError, match=r"0 \.gguf files with 'Q2' in their names; name one of them: m.Q4_K_M"):
        chosen_model("someone/m-GGUF:Q2")
    files[:] = ["config.json", "model.safetensors", "m.Q8_0.gguf"]
    assert chosen_model("someone/m") == "someone/m"


def test_a_tokenizer_of_smollm_splits_digits_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gguf

    for pre, is_repaired in (("smollm", True), ("qwen2", False)):
        path = tmp_path / f"{pre}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_pre(pre)
        writer.add_tensor("a", torch.zeros(32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        seen: list[object] = []
        with monkeypatch.context() as patched:
            patched.setattr(gguf_files, "split_digits_first", seen.append)
            repair_tokenizer("the tokenizer", path)
        assert seen == (["the tokenizer"] if is_repaired else [])
