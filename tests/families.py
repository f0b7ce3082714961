"""Tiny random models of every family that the engine is held to, and of families that it must refuse.

Each factory returns a causal LM in fp32 and eval mode, always with the same weights. Parameters that start at 0 or 1
(norm weights, biases, sinks) are randomised too, so that leaving one out would show. The attention is the model's own
most faithful one: "eager" where transformers' SDPA path leaves out soft-capping or sinks, SDPA elsewhere.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

Factory = Callable[[], PreTrainedModel]
VOCAB_SIZE = 128
WINDOW = 16  # shorter than any test prompt
EAGER_ONLY = {"gemma2", "vaultgemma", "gpt_oss"}  # SDPA knows neither soft-capping nor sinks
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL]}
_THREE_TO_ONE = {"sliding_window": WINDOW, "layer_types": [_SLIDING, _SLIDING, _SLIDING, _FULL]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "without": ("head_dim",),
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def build(
    model_type: str, *, without: tuple[str, ...] = (), headless: bool = False, **settings: Any
) -> PreTrainedModel:
    """A tiny model of a transformers `model_type`.

    Args:
        model_type: as in the model's config.json.
        without: names of `_SHAPE` that this family's config does not take.
        headless: take the bare model instead of a causal LM.
        **settings: over `_SHAPE`.
    """
    shape = {name: value for name, value in _SHAPE.items() if name not in without}
    config = AutoConfig.for_model(model_type, **deepcopy(shape | settings))  # configs write into the dicts they get
    attention = "eager" if model_type in EAGER_ONLY else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto = AutoModel if headless else AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                _randomise(parameter)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.uniform_(-0.1, 0.1)
    return model.eval()


def rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    """`rope_parameters` of a scaled RoPE."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0} | settings}


def _randomise(parameter: torch.Tensor) -> None:
    if parameter.dim() > 1:
        parameter.normal_(0.0, 0.125)  # 1 / sqrt(hidden_size): activations and attention logits keep a scale near 1
    else:
        centre = 1.0 if bool((parameter == 1).all()) else 0.0  # norm weights; norms around 0, biases and sinks
        parameter.uniform_(centre - 0.4, centre + 0.4)


_LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
_YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)
_LOCAL_GLOBAL_ROPE = {
    "rope_parameters": {
        _FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    }
}
_LOCAL_YARN = {"rope_parameters": {_FULL: _YARN["rope_parameters"], _SLIDING: rope("default")["rope_parameters"]}}
_PARTIAL = rope("default", partial_rotary_factor=0.5)
_LLAMA4 = {"intermediate_size_mlp": 96, "moe_layers": [1, 3], "num_local_experts": 4, "num_experts_per_tok": 1}

SUPPORTED: dict[str, Factory] = {
    "llama": partial(build, "llama"),
    "llama_llama3": partial(build, "llama", **_LLAMA3),
    "llama_yarn": partial(build, "llama", **_YARN),
    "llama_linear": partial(build, "llama", **rope("linear", factor=4.0)),
    "llama_biases": partial(
        build, "llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_key_value_heads=4
    ),
    "qwen2": partial(build, "qwen2"),
    "qwen2_sliding": partial(build, "qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen2_moe": partial(build, "qwen2_moe", shared_expert_intermediate_size=32, **_EXPERTS),
    "qwen3": partial(build, "qwen3", head_dim=24),
    "qwen3_moe": partial(build, "qwen3_moe", norm_topk_prob=True, **_EXPERTS),
    "mistral": partial(build, "mistral", sliding_window=WINDOW),
    "ministral": partial(build, "ministral", **_THREE_TO_ONE),
    "mixtral": partial(build, "mixtral", **_LOCAL_EXPERTS),
    "gemma": partial(build, "gemma", num_key_value_heads=1, head_dim=32),
    "gemma2": partial(build, "gemma2", query_pre_attn_scalar=16, attn_logit_softcapping=2.0, **_ALTERNATING),
    "gemma3_text": partial(build, "gemma3_text", query_pre_attn_scalar=16, **_THREE_TO_ONE, **_LOCAL_GLOBAL_ROPE),
    "vaultgemma": partial(build, "vaultgemma", query_pre_attn_scalar=16, attn_logit_softcapping=2.0, **_ALTERNATING),
    "phi": partial(build, "phi", **_PARTIAL),
    "phi3": partial(build, "phi3", **_PARTIAL),
    "phi3_sliding": partial(build, "phi3", sliding_window=WINDOW),
    "phimoe": partial(build, "phimoe", **_LOCAL_EXPERTS),
    "stablelm": partial(build, "stablelm", qk_layernorm=True, use_qkv_bias=True, **_PARTIAL),
    "stablelm_parallel": partial(build, "stablelm", use_parallel_residual=True, **_PARTIAL),
    "glm": partial(build, "glm", **_PARTIAL),
    "glm4": partial(build, "glm4", **_PARTIAL),
    "glm4_moe": partial(
        build,
        "glm4_moe",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        use_qk_norm=True,
        **_PARTIAL,
    ),
    "cohere": partial(build, "cohere", use_qk_norm=True, logit_scale=0.5),
    "cohere2": partial(build, "cohere2", logit_scale=0.5, **_THREE_TO_ONE),
    "olmo": partial(build, "olmo", clip_qkv=1.5),
    "olmo2": partial(build, "olmo2"),
    "olmo3": partial(build, "olmo3", **_THREE_TO_ONE, **_LOCAL_YARN),
    "olmoe": partial(build, "olmoe", num_experts=4, num_experts_per_tok=2),
    "granite": partial(
        build,
        "granite",
        attention_multiplier=0.3,
        embedding_multiplier=6.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    ),
    "granitemoe": partial(build, "granitemoe", attention_multiplier=0.3, residual_multiplier=0.5, **_LOCAL_EXPERTS),
    "smollm3": partial(build, "smollm3"),
    "gpt_oss": partial(build, "gpt_oss", **_LOCAL_EXPERTS, **_ALTERNATING, **_YARN),
    "gpt_neox": partial(build, "gpt_neox", **_PARTIAL),
    "gpt_neox_sequential": partial(build, "gpt_neox", use_parallel_residual=False),
    "starcoder2": partial(build, "starcoder2", sliding_window=WINDOW),
    "ernie4_5": partial(build, "ernie4_5", use_bias=True),
    "ernie4_5_moe": partial(build, "ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=32),
    "exaone4": partial(build, "exaone4", **_THREE_TO_ONE),
    "seed_oss": partial(build, "seed_oss"),
    "llama4_text": partial(build, "llama4_text", **_LLAMA4),
    "nemotron": partial(build, "nemotron", **_PARTIAL),
    "helium": partial(build, "helium"),
    "persimmon": partial(build, "persimmon", **_PARTIAL),
    "apertus": partial(build, "apertus", **_LLAMA3),
    "arcee": partial(build, "arcee"),
    "nanochat": partial(build, "nanochat"),
}

# Right up to a length and wrong behind it, whatever a probe of a few tokens says: the factory, and that length.
LENGTH_DEPENDENT: dict[str, tuple[Factory, int]] = {
    "llama_dynamic": (partial(build, "llama", max_position_embeddings=32, **rope("dynamic", factor=4.0)), 32),
    "phi3_longrope": (
        partial(
            build,
            "phi3",
            original_max_position_embeddings=32,
            **rope(
                "longrope",
                short_factor=[1.0] * 8,
                long_factor=[2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
                original_max_position_embeddings=32,
            ),
        ),
        32,
    ),
    "llama4_chunked": (partial(build, "llama4_text", **_LLAMA4, attention_chunk_size=32), 32),
    "llama4_temperature": (partial(build, "llama4_text", **_LLAMA4, floor_scale=32), 31),
}

REFUSED: dict[str, Factory] = {
    # positions that are no rotation of the cached keys: learned, ALiBi, a weighted norm behind the rotation (hunyuan),
    # MLA, which caches a latent as the keys and the rotated part of the keys as the values (deepseek_v3)
    "gpt2": partial(build, "gpt2"),
    "opt": partial(build, "opt", ffn_dim=96, word_embed_proj_dim=64),
    "gpt_neo": partial(build, "gpt_neo", attention_types=[[["global", "local"], 2]], window_size=WINDOW),
    "bloom": partial(build, "bloom"),
    "mpt": partial(build, "mpt"),
    "gpt_bigcode": partial(build, "gpt_bigcode"),
    "hunyuan_v1_dense": partial(build, "hunyuan_v1_dense"),
    "deepseek_v3": partial(build, "deepseek_v3", **_MLA),
    # attention that does not go through AttentionInterface
    "falcon": partial(build, "falcon", without=("head_dim",), num_kv_heads=2, new_decoder_architecture=True),
    "gptj": partial(build, "gptj", rotary_dim=8),
    "codegen": partial(build, "codegen", rotary_dim=8),
    # state that is not a cache of tokens, or (gemma3n) layers without a cache of their own
    "qwen3_next": partial(
        build,
        "qwen3_next",
        layer_types=["linear_attention", "linear_attention", "linear_attention", _FULL],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        shared_expert_intermediate_size=32,
        **_EXPERTS,
    ),
    "mamba": partial(build, "mamba"),
    "mamba2": partial(build, "mamba2", num_heads=8, n_groups=1, state_size=16),
    "jamba": partial(
        build,
        "jamba",
        use_mamba_kernels=False,
        mamba_d_state=8,
        attn_layer_period=2,
        attn_layer_offset=1,
        **_LOCAL_EXPERTS,
    ),
    "bamba": partial(build, "bamba", attn_layer_indices=[1, 3], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8),
    "recurrent_gemma": partial(build, "recurrent_gemma", lru_width=64, attention_window_size=WINDOW),
    "lfm2": partial(build, "lfm2", layer_types=["conv", _FULL, "conv", _FULL]),
    "falcon_h1": partial(build, "falcon_h1", mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8),
    "granitemoehybrid": partial(
        build, "granitemoehybrid", layer_types=["mamba", "attention"] * 2, mamba_n_heads=8, mamba_d_state=8
    ),
    "minimax": partial(
        build, "minimax", num_local_experts=4, layer_types=["linear_attention", _FULL] * 2, block_size=16
    ),
    "gemma3n_text": partial(
        build,
        "gemma3n_text",
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        layer_types=[_SLIDING, _SLIDING, _FULL] * 2,
        sliding_window=WINDOW,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
    ),
    # not a causal LM, or only with learned positions
    "bert": partial(build, "bert", headless=True),
    "bert_decoder": partial(build, "bert", is_decoder=True),
    "t5": partial(build, "t5", headless=True, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
}
