"""Writes a model's own weights as a GGUF file without a vocabulary, so that llama.cpp can be fed the same token ids.

Nothing is quantised: the file has the model's data type. Only the plainest decoders are written (the Llama and Qwen2
layouts, unscaled RoPE), because a file that is subtly wrong would make the comparison wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prophetkv_rag.errors import InputError
from prophetkv_rag.extras import needs

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def format_of(model: Any) -> str:
    """Return GGUF's name of the model's data type: `"F32"`, `"F16"` or `"BF16"`."""
    return _FORMATS[model.dtype]


def why_not_gguf(model: Any) -> str | None:
    """Return why this model cannot be written, in a few words; `None` if it can."""
    config = model.config
    if config.model_type not in ("llama", "qwen2"):
        return f"models of type {config.model_type!r} are not written as GGUF (only 'llama' and 'qwen2' are)"
    if config.rope_parameters.get("rope_type", "default") != "default":
        return f"RoPE of type {config.rope_parameters['rope_type']!r} is not written as GGUF"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act!r} is not written as GGUF"
    if getattr(config, "use_sliding_window", False):
        return "sliding windows are not written as GGUF"
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        return "biases of this architecture are not written as GGUF"
    if model.dtype not in _FORMATS:
        return f"{model.dtype} is not written as GGUF"
    return None


def write_gguf(model: Any, path: Path) -> None:
    """Write the model's weights and settings to `path`.

    Args:
        model: A transformers causal language model.
        path: Overwritten if it is there.

    Raises:
        InputError: If the model cannot be written (`why_not_gguf`), or the package `gguf` is missing.
    """
    reason = why_not_gguf(model)
    if reason is not None:
        raise InputError(reason)
    with needs("gguf", "gguf", what="writing a GGUF file"):
        import gguf
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(
        gguf.LlamaFileType[f"MOSTLY_{format_of(model)}" if model.dtype != torch.float32 else "ALL_F32"]
    )
    wanted = gguf.GGMLQuantizationType[format_of(model)]
    for name, weight in _tensors(model):
        array = weight.detach().float().cpu().contiguous().numpy()
        # llama.cpp multiplies by norms and adds biases in float32 only.
        kind = wanted if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    yield "token_embd.weight", model.get_input_embeddings().weight
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in _NORMS.items():
            yield f"blk.{number}.{theirs}.weight", layer.get_submodule(ours).weight
        for ours, theirs in _PROJECTIONS.items():
            projection = layer.get_submodule(ours)
            for kind, weight in (("weight", projection.weight), ("bias", projection.bias)):
                if weight is not None:
                    if config.model_type == "llama" and theirs in ("attn_q", "attn_k"):
                        weight = _pairs_together(weight, _head_dim(config))
                    yield f"blk.{number}.{theirs}.{kind}", weight
    yield "output_norm.weight", model.model.norm.weight
    if not config.tie_word_embeddings:
        yield "output.weight", model.get_output_embeddings().weight


def _pairs_together(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder rows (`[heads * head_dim, n]`): for Llama, llama.cpp rotates neighbours, transformers two halves."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
