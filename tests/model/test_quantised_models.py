"""Quantised weights: two models that differ in one packed weight differ, and ratio 1.0 is the model's own prefill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVEngine, UnsupportedModelError
from prophetkv_rag.model import model_fingerprint
from prophetkv_rag.model.tensor_parts import parts_of
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

CHUNKS = list(CORPUS[:3])
PROMPT = Prompt("Context: ", CHUNKS, " Question: when was it built?", glue="\n\n")
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}


class PackedLinear(torch.nn.Module):
    """A layer as GPTQ and AWQ keep it: integers and scales in buffers, unpacked when it is called."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        levels = (linear.weight.detach() / scale).round().to(torch.int32) + 8
        packed = sum(levels[:, nibble::8] << (4 * nibble) for nibble in range(8))
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scale)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        levels = torch.stack([(self.qweight >> (4 * nibble)) & 15 for nibble in range(8)], dim=-1).flatten(1)
        return torch.nn.functional.linear(hidden_states, (levels - 8) * self.scales)


def integers_in_buffers(model: Any, directory: Path) -> Any:
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, PackedLinear(child))
    return model


def dynamic_fp16(model: Any, directory: Path) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.float16)


def torchao(config: str, **settings: Any) -> Callable[[Any, Path], Any]:
    def quantise(model: Any, directory: Path) -> Any:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, config)(**settings))
        return model

    return quantise


def reloaded(package: str, config: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Callable[..., Any]:
    def quantise(model: Any, directory: Path) -> Any:
        pytest.importorskip(package)
        import transformers

        model.save_pretrained(directory)
        chosen = getattr(transformers, config)(**settings)
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=chosen)

    return quantise


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
ACCEPTED: dict[str, Callable[[Any, Path], Any]] = {
    "integers_in_buffers": integers_in_buffers,
    "torch_dynamic_fp16": dynamic_fp16,
    "torchao_int8_weight_only": torchao("Int8WeightOnlyConfig"),
    "torchao_int4_weight_only": torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao_fp8_weight_only": torchao("Float8WeightOnlyConfig"),
    "quanto_int8": reloaded("optimum.quanto", "QuantoConfig", weights="int8"),
    "quanto_int4": reloaded("optimum.quanto", "QuantoConfig", weights="int4"),
    "bitsandbytes_nf4": reloaded("bitsandbytes", "BitsAndBytesConfig", torch.bfloat16, **NF4),
    "bitsandbytes_nf4_double": reloaded(
        "bitsandbytes", "BitsAndBytesConfig", torch.bfloat16, bnb_4bit_use_double_quant=True, **NF4
    ),
}


def quantised(name: str, directory: Path, *, changed: bool = False) -> Any:
    model = tiny_llama(**SHAPE)
    if changed:  # one weight of one layer, by more than a step of any format
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight[3, 5] += 0.2
    return ACCEPTED[name](model, directory)


@pytest.mark.parametrize("name", ACCEPTED)
def test_one_packed_weight_more_or_less_is_another_model(name: str, tmp_path: Path) -> None:
    one, same, other = (
        ProphetKVEngine(quantised(name, tmp_path / str(i), changed=changed), None).identity
        for i, changed in enumerate((False, False, True))
    )
    assert one == same
    assert one.model != other.model


@pytest.mark.parametrize("name", ACCEPTED)
def test_all_recomputed_is_the_models_own_prefill(name: str, tmp_path: Path) -> None:
    model = quantised(name, tmp_path)
    engine = ProphetKVEngine(model, tiny_tokenizer())
    engine.add_chunks(CHUNKS)
    result = engine.prefill(PROMPT, recompute_ratio=1.0)
    full = engine.prefill(PROMPT, strategy="full_prefill")
    with torch.no_grad():
        expected = model(input_ids=result.input_ids).logits[:, -1].float()
    bound = 1e-4 if engine.support.dtype == "float32" else 6e-2
    scale = float(expected.abs().max())
    assert float((result.logits - full.logits).abs().max()) <= bound * scale
    assert float((full.logits - expected).abs().max()) <= bound * scale
    assert engine.prefill(PROMPT).report.reused_tokens > 0


@pytest.mark.parametrize("name", ACCEPTED)
def test_taking_the_fingerprint_leaves_the_model_as_it_is(name: str, tmp_path: Path) -> None:
    """A packed weight may be unpacked by asking for it, and not get back what it was."""
    model, ids = quantised(name, tmp_path), torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        first = model_fingerprint(model)
        assert torch.equal(model(ids).logits, before)
    engine = ProphetKVEngine(model, tiny_tokenizer())
    engine.add_chunks(CHUNKS)
    engine.generate(PROMPT, max_new_tokens=3)
    assert model_fingerprint(model) == first == engine.identity.model


REFUSED = {
    "torch_dynamic_int8": lambda model: torch.ao.quantization.quantize_dynamic(
        model, {torch.nn.Linear}, dtype=torch.qint8
    ),
    "torchao_dynamic_int8": lambda model: torchao("Int8DynamicActivationInt8WeightConfig")(model, Path()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_activations_that_are_quantised_together_are_refused(name: str) -> None:
    model = REFUSED[name](tiny_llama(**SHAPE))
    with pytest.raises(UnsupportedModelError, match="activations"):
        ProphetKVEngine(model, tiny_tokenizer())
    assert len(model_fingerprint(model)) == 64


def test_dynamic_int8_weights_are_told_apart() -> None:
    def fingerprint(change: float) -> str:
        model = tiny_llama(**SHAPE)
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight[3, 5] += change
        return model_fingerprint(REFUSED["torch_dynamic_int8"](model))

    assert fingerprint(0.0) == fingerprint(0.0) != fingerprint(0.05)


def test_every_kind_of_tensor_is_taken_apart() -> None:
    weights = torch.arange(12.0).reshape(3, 4)
    kinds = [
        weights,
        weights.to(torch.complex64),
        weights.to(torch.float8_e4m3fn),
        weights > 3,
        weights.to_sparse(),
        weights.to_sparse_csr(),
        torch.quantize_per_tensor(weights, 0.1, 2, torch.qint8),
        torch.quantize_per_channel(weights, torch.full((3,), 0.1), torch.zeros(3), 0, torch.quint8),
        (weights, None, torch.qint8, {"bits": 4, "group": weights}),
    ]
    for value in kinds:
        parts = dict(parts_of("weight", value))
        assert parts
        for part in parts.values():
            assert isinstance(part, str) or (part.layout is torch.strided and not part.is_quantized)
    scaled = torch.quantize_per_tensor(weights * 2, 0.2, 2, torch.qint8)
    assert dict(parts_of("weight", scaled))["weight.scale"] != dict(parts_of("weight", kinds[6]))["weight.scale"]


def test_what_does_not_tell_what_it_holds_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"weight head is a .*Storage.*, which does not tell"):
        list(parts_of("head", torch.zeros(2).untyped_storage()))
    with pytest.raises(UnsupportedModelError, match="weight head is not in memory"):
        list(parts_of("head", torch.empty(2, device="meta")))


def test_plain_models_keep_the_identity_they_had() -> None:
    """Caches on disk stay valid: of dense weights the same bytes are taken as before packed ones were looked into."""
    model = tiny_llama()
    volatile = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in volatile}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        bits = tensor.reshape(-1).view(torch.int32)
        head = f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{int(bits.sum(dtype=torch.int64))}|"
        digest.update(head.encode() + bits[:: max(1, bits.numel() // 64)][:64].numpy().tobytes())
    assert model_fingerprint(model) == digest.hexdigest()
