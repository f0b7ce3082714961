"""What the naive reference is judged by: transformers' own Llama, and chunk reuse written as ONE ordinary pass of it.

transformers has no chunk reuse, but copied tokens, true position ids and a 4-D mask say the same (`reuse_as_one_pass`).
Stale chunk tokens see their own chunk and their own copy of the encoding prefix; fresh rows see fresh rows and the
stale tokens that were not selected.
"""

from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from prophetkv_rag.model import CACHE_NAME, cache_argument
from tests.reuse.naive.llama_reference import NaiveLlama
from tests.reuse.naive.prompt_reference import context_positions, fresh_positions, prompt_ids

SHAPES = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "wide_heads": {"num_key_value_heads": 1, "head_dim": 32},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}


def tiny_llama(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # far from linear: an error in any part shows
        "attn_implementation": "eager",
    }
    model = LlamaForCausalLM(LlamaConfig(**(shape | SHAPES[name]))).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.double()


def naive_of(model: LlamaForCausalLM) -> NaiveLlama:
    rotary = model.model.rotary_emb
    return NaiveLlama(
        model.state_dict(), model.config, inv_freq=rotary.inv_freq, attention_scaling=rotary.attention_scaling
    )


class Pass(NamedTuple):
    logits: np.ndarray  # [rows, V]
    keys: list[np.ndarray]  # per layer [Hkv, rows, D], rotated
    values: list[np.ndarray]
    attentions: list[np.ndarray]  # per layer [heads, rows, rows]


def transformers_pass(model, ids, positions=None, allowed=None) -> Pass:
    """One pass of the model; `allowed` `[rows, rows]` is narrowed to sliding windows where the model has some."""
    positions = np.arange(len(ids)) if positions is None else np.asarray(positions)
    allowed = positions[None, :] <= positions[:, None] if allowed is None else allowed
    with torch.no_grad():
        out = model(
            torch.tensor([list(ids)]),
            position_ids=torch.from_numpy(positions)[None],
            attention_mask=_masks(model, positions, allowed),
            use_cache=True,
            **cache_argument(model, DynamicCache()),  # one of the model's own drops rows outside its windows
            output_attentions=True,
        )
    layers = out[CACHE_NAME].layers
    return Pass(
        out.logits[0].numpy(),
        [layer.keys[0].numpy() for layer in layers],
        [layer.values[0].numpy() for layer in layers],
        [attention[0].numpy() for attention in out.attentions or ()],
    )


def _masks(model, positions, allowed):
    """As the model takes them: one `[1, 1, rows, rows]`, or one for each type of layer."""

    def mask(seen):
        drawn = torch.zeros(1, 1, *seen.shape, dtype=model.dtype)
        drawn[0, 0][~torch.from_numpy(seen)] = torch.finfo(model.dtype).min
        return drawn

    window = getattr(model.config, "sliding_window", None)
    if not window:
        return mask(allowed)
    narrowed = mask(allowed & (positions[None, :] > positions[:, None] - window))
    types = getattr(model.config, "layer_types", None) or ["sliding_attention"]
    if "full_attention" not in types:
        return narrowed
    return {"full_attention": mask(allowed), "sliding_attention": narrowed}


def reuse_as_one_pass(model, encoding_prefix, segments, *, selected=(), others=None, glue=True, extra=()):
    """Chunk reuse as one masked forward pass of transformers' model. Returns it, its rows' positions and kinds.

    With `others` the selected rows see no other stale tokens than those at these positions.
    """
    ids, positions, kinds = [], [], []  # kind: chunk number for stale rows, -1 - chunk for its prefix copy, "fresh"

    def put(token, position, kind):
        ids.append(token)
        positions.append(position)
        kinds.append(kind)

    start = 0
    for number, (segment_ids, is_chunk) in enumerate(segments):
        if is_chunk:
            for offset, token in enumerate(encoding_prefix):
                put(token, start - len(encoding_prefix) + offset, -1 - number)
            for offset, token in enumerate(segment_ids):
                put(token, start + offset, number)
        start += len(segment_ids)
    prompt, context = prompt_ids(segments), context_positions(segments)
    for position in sorted({*fresh_positions(segments), *selected}):
        if glue or position < context[0] or position > context[-1]:
            put(prompt[position], position, "fresh")
    for offset, token in enumerate(extra):
        put(token, len(prompt) + offset, "fresh")
    allowed = np.zeros((len(ids), len(ids)), dtype=bool)
    for row, (row_position, row_kind) in enumerate(zip(positions, kinds, strict=True)):
        for column, (position, kind) in enumerate(zip(positions, kinds, strict=True)):
            if row_kind == "fresh":
                is_shown = others is None or row_position not in selected or position in others
                sees = kind == "fresh" or (kind >= 0 and position not in selected and is_shown)
            else:
                sees = kind != "fresh" and kind in (row_kind, -1 - row_kind)
            allowed[row, column] = sees and position <= row_position
    return transformers_pass(model, ids, positions, allowed), positions, kinds


def holders(segments, positions, kinds, selected):
    """The row of the masked pass that holds each prompt position's K and V."""
    rows = list(zip(positions, kinds, strict=True))
    fresh = {*selected, *fresh_positions(segments)}
    return [
        next(row for row, (p, kind) in enumerate(rows) if p == position and _is_holder(kind, position in fresh))
        for position in range(len(prompt_ids(segments)))
    ]


def _is_holder(kind, is_fresh):
    return kind == "fresh" if is_fresh else kind != "fresh" and kind >= 0
