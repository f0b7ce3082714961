"""What cannot be served is refused at start, with the reason and what to do; nothing is served wrong by accident."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import BloomConfig, BloomForCausalLM
from vllm import LLM
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

from prophetkv_rag.errors import InputError, UnsupportedModelError
from prophetkv_rag.integrations.vllm.settings import ConnectorSettings, RequestOptions
from prophetkv_rag.integrations.vllm.support import check_release
from prophetkv_rag.store.encryption import write_new_key
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.vllm.serving import transfer_config
from tests.vllm.test_models import SHAPE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(**SHAPE).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def no_connector_is_left():
    """vLLM keeps a worker's connector for the whole process, also when its start fails."""
    yield
    ensure_kv_transfer_shutdown()


def start(model, config, **settings):
    LLM(
        str(model),
        **{"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "kv_transfer_config": config} | settings,
    )


def test_releases_that_were_not_tried():
    check_release("0.31.4")
    for version in ("0.30.9", "0.33.0", "1.0"):
        with pytest.raises(InputError, match=r"from 0.31 to 0.32"):
            check_release(version)


def test_other_connectors_beside_ours_would_save_approximate_blocks(model, tmp_path):
    both = [transfer_config(tmp_path / "caches"), {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}]
    config = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": both},
    }
    with pytest.raises(InputError, match="MultiConnector"):
        start(model, config)


def test_a_model_that_biases_attention_by_distance(tmp_path):
    config = BloomConfig(vocab_size=480, hidden_size=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tiny_tokenizer().save_pretrained(tmp_path / "bloom")
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        start(tmp_path / "bloom", transfer_config(tmp_path / "caches"))


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        ({"kv_load_failure_policy": "fail"}, {}, '"kv_load_failure_policy": "recompute"'),
        ({"kv_role": "kv_both"}, {}, "kv_consumer"),
        ({"kv_connector_extra_config": {"directory": "x", "recompute_ration": 1}}, {}, "'recompute_ration'"),
        ({"kv_connector_extra_config": {}}, {}, "needs directory"),
        ({}, {"enable_lora": True}, "LoRA"),
    ],
)
def test_settings_that_cannot_be_served(model, tmp_path, monkeypatch, change, settings, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=reason):
        start(model, transfer_config(tmp_path / "caches") | change, **settings)


def test_speculative_decoding(model, tmp_path):
    """By a draft model: what else there is imports numba, and vLLM 0.32 starts no model after that in this process."""
    draft = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 2}
    with pytest.raises(InputError, match="speculative decoding is not supported"):
        start(model, transfer_config(tmp_path), speculative_config=draft)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"directory": ""}, "directory"),
        ({"directory": "x", "recompute_ratio": 1.5}, "recompute_ratio"),
        ({"directory": "x", "min_chunk_tokens": 0}, "at least 1"),
        ({"directory": "x", "max_stage_tokens": "many"}, "whole number"),
        ({"directory": "x", "read_ahead_s": -0.5}, "number of seconds"),
        ({"directory": "x", "read_ahead_s": float("inf")}, "number of seconds"),
        ({"directory": "x", "read_ahead_s": True}, "number of seconds"),
        ({"directory": "x", "may_register": 1}, "true or false"),
        ({"directory": "x", "namespace_max_bytes": 0}, "at least 1"),
        ({"directory": "x", "cache_format": "int5"}, "int5"),
        ({"directory": "x", "encoding": "neighbours:99"}, "neighbours:99"),
    ],
)
def test_values_outside_what_is_allowed(given, reason):
    with pytest.raises(InputError, match=reason):
        ConnectorSettings.of(given)


def test_caches_of_another_key_are_not_begun_with(tmp_path):
    for name in "ab":
        write_new_key(tmp_path / name)
    settings = ConnectorSettings(directory=str(tmp_path / "caches"), key_file=str(tmp_path / "a"))
    settings.open_store(ram_bytes=0).close()
    with pytest.raises(InputError, match="key"):
        replace(settings, key_file=str(tmp_path / "b")).open_store(ram_bytes=0)
    with pytest.raises(InputError, match="none"):
        replace(settings, key_file=str(tmp_path / "none")).open_store(ram_bytes=0)


def test_settings_go_there_and_back():
    settings = ConnectorSettings(directory="x", recompute_ratio=0.3, max_stage_tokens=7)
    assert ConnectorSettings.of(settings.given()) == settings
    assert settings.given() == {"directory": "x", "recompute_ratio": 0.3, "max_stage_tokens": 7}


def test_options_of_requests_that_say_nothing():
    for params in (None, {}, {"do_remote_decode": True}, "text"):
        assert RequestOptions.of(params, vocabulary=100) == RequestOptions()


@pytest.mark.parametrize("name", ["in_order", "as_neighbours", "refresh", "first_chunks"])
def test_options_of_requests_are_yes_or_no(name):
    assert getattr(RequestOptions.of({"prophetkv": {name: True}}, vocabulary=100), name) is True
    with pytest.raises(InputError, match=f"{name} is 1"):
        RequestOptions.of({"prophetkv": {name: 1}}, vocabulary=100)
