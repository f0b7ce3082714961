"""The independent reference: ProphetKV on a Llama, written apart from the engine, slowly and in float64.

Nothing here comes from `prophetkv_rag` or from transformers' model code: NumPy, float64, and explicit loops over
layers, rows and heads. It follows arXiv 2602.02579, sections 4.2 and 4.3, with this project's conventions:

- layer:      h += W_o softmax(q K^T / sqrt(d)) V over key positions <= the row's own;  h += W_d (silu(W_g x) * W_u x)
- RoPE:       R_p(x) = x cos(p w) + rotate_half(x) sin(p w), w = `inv_freq`; queries and keys carry `attention_scaling`
- chunk:      encoded behind a prefix whose rows are dropped; its keys are kept before R_p, with `attention_scaling`
- stage I:    the suffix rows attend to the exact prefix, the stale chunks and themselves (glue is invisible);
              score(t) = sum over layers of the mean over query heads and scoring rows of softmax(q . k_t / sqrt(d))
- selection:  the floor(ratio * C) best of the C chunk tokens, ties to the lower position
- stage II:   selected and fresh rows restart from their embeddings; in each layer their keys and values replace the
              stale ones before that layer attends; selected rows may be told to attend to a part of the context

Inside, a key is always held un-rotated and is rotated to its position each time it is read; what the public methods
return as a prompt's keys is rotated. Shapes: Hkv = num_key_value_heads, D = head_dim, N prompt tokens, C chunk tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.reuse.naive.prompt_reference import Segment, context_positions, fresh_positions, prompt_ids, suffix_positions

Array = NDArray[np.float64]
Positions = NDArray[np.int64]
KeysValues = tuple[list[Array], list[Array]]  # per layer: keys and values, each [Hkv, tokens, D]
Observer = Callable[
    [int, int, Positions, Array], None
]  # layer, row, seen key positions, attention logits [heads, seen]


class NaiveLlama:
    """Any Llama-family model: GQA, no biases, RMSNorm, SwiGLU, tied or untied embeddings.

    Args:
        state_dict: of a transformers `LlamaForCausalLM`.
        config: its config (only plain attributes are read).
        inv_freq: `[D // 2]`; needed for every `rope_type` but "default".
        attention_scaling: the factor on cos and sin (YaRN); 1 otherwise.
    """

    def __init__(
        self, state_dict: Mapping[str, Any], config: Any, *, inv_freq: Any = None, attention_scaling: float = 1.0
    ) -> None:
        if any(name.endswith(".bias") for name in state_dict) or config.hidden_act != "silu":
            raise ValueError("only Llama shapes without biases and with silu")
        rope = config.rope_parameters
        if inv_freq is None and rope.get("rope_type", "default") != "default":
            raise ValueError(f"pass inv_freq: rope_type is {rope['rope_type']}")
        self.weights: dict[str, Array] = {name: _float64(tensor) for name, tensor in state_dict.items()}
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps: float = config.rms_norm_eps
        if inv_freq is None:
            exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
            inv_freq = 1.0 / float(rope["rope_theta"]) ** exponents
        self.inv_freq = _float64(inv_freq)
        self.attention_scaling = float(attention_scaling)
        self.embeddings = self.weights["model.embed_tokens.weight"]
        self.unembedding = self.weights.get("lm_head.weight", self.embeddings)

    def full_prefill(self, ids: Sequence[int]) -> tuple[Array, list[Array], list[Array]]:
        """Logits `[N, V]`, rotated keys and values of the whole prompt, computed without any reuse."""
        keys, values = self._empty(len(ids))
        hidden = self._run_rows(ids, range(len(ids)), keys, values, visible=range(len(ids)))
        return np.stack([self._logits(row) for row in hidden]), self._rotate_all(keys), values

    def encode_chunk(self, prefix_ids: Sequence[int], chunk_ids: Sequence[int]) -> KeysValues:
        """Un-rotated keys (times `attention_scaling`) and values of a chunk behind a prefix; the prefix is dropped."""
        ids = [*prefix_ids, *chunk_ids]
        keys, values = self._empty(len(ids))
        self._run_rows(ids, range(len(ids)), keys, values, visible=range(len(ids)))
        start = len(prefix_ids)
        return [layer[:, start:] for layer in keys], [layer[:, start:] for layer in values]

    def assemble(self, segments: Sequence[Segment], chunk_caches: Sequence[KeysValues]) -> KeysValues:
        """The chunks' keys rotated to their places in the prompt, and their values; fresh rows are zeros."""
        keys, values = self._place_chunks(segments, chunk_caches)
        return self._rotate_all(keys), values

    def plain_reuse(
        self, segments: Sequence[Segment], chunk_caches: Sequence[KeysValues]
    ) -> tuple[Array, list[Array], list[Array]]:
        """Nothing recomputed: fresh rows one by one, in order, over the stale chunks. Last row's logits `[V]`, K, V."""
        ids = prompt_ids(segments)
        suffix_positions(segments)  # raises where the prompt has no suffix
        keys, values = self._place_chunks(segments, chunk_caches)
        for position in fresh_positions(segments):
            (hidden,) = self._run_rows([ids[position]], [position], keys, values, visible=range(position + 1))
        return self._logits(hidden), self._rotate_all(keys), values

    def stage_one_scores(
        self,
        segments: Sequence[Segment],
        chunk_caches: Sequence[KeysValues],
        *,
        scoring_rows: Literal["suffix"] | Sequence[int] = "suffix",
        softmax: Literal["context", "full_row"] = "context",
        extra_query_ids: Sequence[int] | None = None,
        first_layer: int = 0,
        last_layer: int | None = None,
        over_rows: Literal["mean", "norm"] = "mean",
    ) -> Array:
        """Scores `[C]` of the chunk tokens, in prompt order.

        Args:
            segments: the prompt.
            chunk_caches: one per chunk segment, from `encode_chunk`.
            scoring_rows: whose attention is averaged: all suffix rows, or some, as indices into the suffix.
            softmax: normalised over the chunk tokens only, or over everything that the row attends to.
            extra_query_ids: a question that stands elsewhere: rows behind the prompt's last token, attending to all
                that stage I sees. They are then the scoring rows, and are dropped afterwards.
            first_layer: layers before it do not count.
            last_layer: nor do layers behind this one.
            over_rows: "norm": per layer, the L2 norm over scoring rows of the mean over heads; the layers' mean.
        """
        suffix, context = suffix_positions(segments), context_positions(segments)
        extra = list(extra_query_ids or [])
        ids = [*prompt_ids(segments), *extra]
        total = len(ids) - len(extra)
        prefix = range(context[0])
        rows = [*suffix, *range(total, len(ids))]
        scoring = suffix if scoring_rows == "suffix" else [suffix[int(index)] for index in scoring_rows]
        scoring = list(range(total, len(ids))) if extra else scoring
        keys, values = self._place_chunks(segments, chunk_caches, extra_rows=len(extra))
        self._run_rows(ids[: len(prefix)], prefix, keys, values, visible=prefix)
        scores = np.zeros(len(context))
        received: dict[tuple[int, int], Array] = {}  # by layer and row, [C]: the mean over heads

        def observe(layer: int, row: int, seen: Positions, logits: Array) -> None:
            if row not in scoring or layer < first_layer or (last_layer is not None and layer > last_layer):
                return
            is_context = np.isin(seen, context)
            for head in logits:
                weights = _softmax(head[is_context]) if softmax == "context" else _softmax(head)[is_context]
                scores[:] += weights / (len(logits) * len(scoring))
                received[layer, row] = received.get((layer, row), np.zeros(len(context))) + weights / len(logits)

        visible = [*prefix, *context, *rows]
        self._run_rows([ids[row] for row in rows], rows, keys, values, visible=visible, observe=observe)
        if over_rows == "norm":
            layers = sorted({layer for layer, _ in received})
            squares = [sum(weights**2 for (at, _), weights in received.items() if at == layer) for layer in layers]
            return np.asarray(np.mean(np.sqrt(squares), axis=0))
        return scores

    def recompute(
        self,
        segments: Sequence[Segment],
        chunk_caches: Sequence[KeysValues],
        selected: Iterable[int],
        *,
        others: Iterable[int] | None = None,
    ) -> tuple[Array, list[Array], list[Array]]:
        """Stage II: the selected prompt positions and all fresh rows. Last row's logits `[V]`, K, V.

        Fresh rows see everything before them; selected ones too, or, with `others`, only those positions, each other
        and the fresh ones.
        """
        ids, chosen = prompt_ids(segments), set(selected)
        suffix_positions(segments)  # raises where the prompt has no suffix
        if not chosen <= set(context_positions(segments)):
            raise ValueError("only chunk tokens can be selected")
        fresh = set(fresh_positions(segments))
        rows = sorted(chosen | fresh)
        keys, values = self._place_chunks(segments, chunk_caches)
        narrow = None if others is None else {position: chosen | fresh | set(others) for position in chosen}
        hidden = self._run_rows([ids[row] for row in rows], rows, keys, values, visible=range(len(ids)), narrow=narrow)
        return self._logits(hidden[-1]), self._rotate_all(keys), values

    def _run_rows(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        keys: list[Array],
        values: list[Array],
        *,
        visible: Iterable[int],
        observe: Observer | None = None,
        narrow: Mapping[int, set[int]] | None = None,
    ) -> list[Array]:
        """Run rows from their embeddings through all layers, writing their K/V in place; hidden states out.

        In each layer all rows first write their key and value, then each attends to `visible` up to its own position,
        or, if its position is in `narrow`, to what stands there.
        """
        visible_positions = np.array(sorted(visible), dtype=np.int64)
        hidden = [self.embeddings[token].copy() for token in ids]
        group = self.num_heads // self.num_kv_heads
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}."
            queries = []
            for row, position in enumerate(positions):
                normed = self._rms_norm(hidden[row], name + "input_layernorm")
                query = self._linear(normed, name + "self_attn.q_proj").reshape(self.num_heads, self.head_dim)
                key = self._linear(normed, name + "self_attn.k_proj").reshape(self.num_kv_heads, self.head_dim)
                value = self._linear(normed, name + "self_attn.v_proj").reshape(self.num_kv_heads, self.head_dim)
                queries.append(self._rotate(query * self.attention_scaling, np.array(position)))
                keys[layer][:, position] = key * self.attention_scaling
                values[layer][:, position] = value
            rotated = self._rotate(keys[layer], np.arange(keys[layer].shape[1]))
            for row, position in enumerate(positions):
                seen = visible_positions[visible_positions <= position]
                if narrow is not None and position in narrow:
                    seen = np.array([key for key in seen.tolist() if key in narrow[position]], dtype=np.int64)
                logits = np.empty((self.num_heads, len(seen)))
                heads = []
                for head in range(self.num_heads):
                    logits[head] = rotated[head // group, seen] @ queries[row][head] / math.sqrt(self.head_dim)
                    heads.append(_softmax(logits[head]) @ values[layer][head // group, seen])
                if observe is not None:
                    observe(layer, position, seen, logits)
                hidden[row] = hidden[row] + self._linear(np.concatenate(heads), name + "self_attn.o_proj")
                normed = self._rms_norm(hidden[row], name + "post_attention_layernorm")
                gate = self._linear(normed, name + "mlp.gate_proj")
                inner = gate / (1.0 + np.exp(-gate)) * self._linear(normed, name + "mlp.up_proj")
                hidden[row] = hidden[row] + self._linear(inner, name + "mlp.down_proj")
        return hidden

    def _place_chunks(
        self, segments: Sequence[Segment], chunk_caches: Sequence[KeysValues], *, extra_rows: int = 0
    ) -> KeysValues:
        keys, values = self._empty(len(prompt_ids(segments)) + extra_rows)
        caches = iter(chunk_caches)
        start = 0
        for ids, is_chunk in segments:
            if is_chunk:
                chunk_keys, chunk_values = next(caches)
                for layer in range(self.num_layers):
                    keys[layer][:, start : start + len(ids)] = chunk_keys[layer]
                    values[layer][:, start : start + len(ids)] = chunk_values[layer]
            start += len(ids)
        if next(caches, None) is not None:
            raise ValueError("more chunk caches than chunks")
        return keys, values

    def _empty(self, num_tokens: int) -> KeysValues:
        shape = (self.num_kv_heads, num_tokens, self.head_dim)
        return [np.zeros(shape) for _ in range(self.num_layers)], [np.zeros(shape) for _ in range(self.num_layers)]

    def _rotate(self, states: Array, positions: Positions) -> Array:
        """R_p on `[..., D]`; `positions` is a scalar, or has the length of the last but one axis."""
        angles = positions[..., None].astype(np.float64) * self.inv_freq  # [..., D // 2]
        first, second = np.split(states, 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _rotate_all(self, keys: list[Array]) -> list[Array]:
        return [self._rotate(layer, np.arange(layer.shape[1])) for layer in keys]

    def _linear(self, states: Array, name: str) -> Array:
        return self.weights[name + ".weight"] @ states

    def _rms_norm(self, states: Array, name: str) -> Array:
        root: float = np.sqrt(np.mean(states**2) + self.eps)
        return self.weights[name + ".weight"] * states / root

    def _logits(self, hidden: Array) -> Array:
        return self.unembedding @ self._rms_norm(hidden, "model.norm")


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def _float64(tensor: Any) -> Array:
    """A torch tensor of any float type, or an array."""
    return np.asarray(tensor.detach().cpu().double().numpy() if hasattr(tensor, "detach") else tensor, dtype=np.float64)
