"""Independent references for three rival corrections of reused KV caches: LegoLink (EPIC), CacheBlend and KVShare.

Written from their descriptions on the naive float64 Llama, apart from the engine, slowly, with explicit loops.

A correction is a schedule: `rows_by_layer[l]` are the chunk tokens (prompt positions) that are computed in layer l. The
sets are nested: who is dropped never comes back. In each layer the computed rows (these and all fresh ones: prefix,
glue, suffix) first write their key and value over the stale ones, then each attends to every position up to its own in
the merged cache. A token dropped after layer l thus has fresh K/V in layers 0..l and stale K/V behind.

- LegoLink-k:  the first k tokens of every chunk, in all layers; a first chunk that is exact is left out
- CacheBlend:  all chunk tokens in layers 0 and 1, then the `count` tokens whose V (or K) moved most in layer 1, counted
               as the squared L2 distance between fresh and stale; gradual: pruned further in each later layer
- KVShare:     as CacheBlend, by the attention received in layer 1 times the L1 distance of V in layer 1

Ties go to the lower position. Positions are returned sorted. Layer indices start at 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from tests.reuse.naive.llama_reference import Array, KeysValues, NaiveLlama, _softmax
from tests.reuse.naive.prompt_reference import Segment, context_positions, fresh_positions, prompt_ids, suffix_positions

Segments = Sequence[Segment]
Caches = Sequence[KeysValues]  # one per chunk segment, from `NaiveLlama.encode_chunk`
Span = tuple[int, int]  # first position, one past the last
Schedule = list[list[int]]  # per layer: the chunk tokens computed in it
Variant = Literal["v", "k", "kv"]

SELECTION_LAYER = 1
"""The layer whose K and V are fresh for all tokens, and are compared with the stale ones."""


class RivalPass(NamedTuple):
    """What a run leaves behind."""

    logits: Array  # [V], of the prompt's last token
    keys: list[Array]  # per layer [Hkv, N, D], rotated
    values: list[Array]  # per layer [Hkv, N, D]
    rows_by_layer: Schedule
    charged: int  # (chunk token, layer) pairs computed; fresh rows are not counted


class LayerView(NamedTuple):
    """What a choice may look at: one layer, after its rows have written their K and V."""

    layer: int
    rows: list[int]  # the chunk tokens computed in this layer
    keys: Array  # [Hkv, N, D], rotated, merged
    values: Array
    stale_keys: Array  # the same before anything was computed; zeros for fresh rows
    stale_values: Array
    attention: Array  # [heads, N, N]: what row i gives to column j; zeros for rows that are not computed


Choice = Callable[[LayerView], Iterable[int]]


def chunk_spans(segments: Segments) -> list[Span]:
    """Where the chunks lie in the prompt."""
    spans, start = [], 0
    for ids, is_chunk in segments:
        if is_chunk:
            spans.append((start, start + len(ids)))
        start += len(ids)
    return spans


def first_chunk_is_exact(segments: Segments, encoding_prefix: Sequence[int]) -> bool:
    """Whether the prompt begins with the encoding prefix and then the first chunk, with nothing else before it."""
    before = []
    for ids, is_chunk in segments:
        if is_chunk:
            return before == list(encoding_prefix)
        before.extend(ids)
    return False


def epic_rows(
    chunk_spans: Sequence[Span], k: int | None = None, budget: int | None = None, *, exact_first: bool
) -> list[int]:
    """LegoLink-k, for all layers.

    Args:
        chunk_spans: in prompt order.
        k: so many tokens from each chunk, or the whole chunk where it is shorter.
        budget: instead of k: so many tokens in all. The largest k that it pays for; what is left buys the next token
            of the first chunks that have one. A budget beyond all tokens buys them all.
        exact_first: the first chunk needs no correction and gets none.
    """
    if (k is None) == (budget is None):
        raise ValueError("pass k or budget")
    spans = list(chunk_spans)[1:] if exact_first else list(chunk_spans)
    left = 0
    if budget is not None:
        longest = max([end - start for start, end in spans], default=0)
        k = max(tried for tried in range(longest + 1) if sum(min(tried, end - start) for start, end in spans) <= budget)
        left = budget - sum(min(k, end - start) for start, end in spans)
    rows = []
    for start, end in spans:
        take = min(k, end - start)
        if left > 0 and end - start > k:
            take += 1
            left -= 1
        rows.extend(range(start, start + take))
    return rows


def cacheblend_scores(naive: NaiveLlama, segments: Segments, chunk_caches: Caches, *, variant: Variant = "v") -> Array:
    """How far each chunk token's V (or K, or both) moved in layer 1, `[C]`, in prompt order."""
    view = _selection_view(naive, segments, chunk_caches)
    return np.array([_deviation(view, position, variant) for position in context_positions(segments)])


def cacheblend_rows(
    naive: NaiveLlama, segments: Segments, chunk_caches: Caches, count: int, *, variant: Variant = "v"
) -> list[int]:
    """CacheBlend with one selection, in layer 1: the `count` tokens that go on from layer 2 (`from_layer_two`)."""
    scores = cacheblend_scores(naive, segments, chunk_caches, variant=variant)
    return _best(context_positions(segments), scores, count)


def cacheblend_gradual_rows(
    naive: NaiveLlama,
    segments: Segments,
    chunk_caches: Caches,
    counts_per_layer: Sequence[int],
    *,
    variant: Variant = "v",
) -> Schedule:
    """CacheBlend with gradual filtering: after each layer the tokens that moved most in it, among those still kept.

    `counts_per_layer[l]` is the number of tokens kept beyond layer l, that is computed in layer l + 1. It starts with
    all of them (nothing has moved in layer 0) and never grows. A list that ends early keeps its last number; the last
    layer's number has no effect. Returns who is computed in each layer; the final selection is the last entry.
    """
    counts = list(counts_per_layer)
    if counts[0] != len(context_positions(segments)) or counts != sorted(counts, reverse=True):
        raise ValueError("counts start with all chunk tokens and never grow")

    def choose(view: LayerView) -> list[int]:
        moved = [_deviation(view, position, variant) for position in view.rows]
        return _best(view.rows, moved, counts[min(view.layer, len(counts) - 1)])

    return _run(naive, segments, chunk_caches, context_positions(segments), choose).rows_by_layer


def kvshare_scores(
    naive: NaiveLlama, segments: Segments, chunk_caches: Caches, *, attending: Iterable[int] | None = None
) -> Array:
    """Attention received in layer 1 times the L1 distance of V in layer 1, `[C]`, in prompt order.

    `attending` are the rows whose attention is summed, by default all of the prompt. The softmax runs over all that a
    row sees, prefix and glue included.
    """
    view = _selection_view(naive, segments, chunk_caches)
    total, num_heads = len(prompt_ids(segments)), len(view.attention)
    givers = list(range(total)) if attending is None else sorted(set(attending))
    scores = []
    for position in context_positions(segments):
        received = 0.0
        for row in givers:
            for head in range(num_heads):
                received += view.attention[head, row, position] / num_heads
        moved = np.abs(view.values[:, position] - view.stale_values[:, position]).sum()
        scores.append(received * moved)
    return np.array(scores)


def kvshare_rows(
    naive: NaiveLlama, segments: Segments, chunk_caches: Caches, count: int, *, attending: Iterable[int] | None = None
) -> list[int]:
    """KVShare: the `count` tokens of the highest `kvshare_scores`; they go on from layer 2 (`from_layer_two`)."""
    scores = kvshare_scores(naive, segments, chunk_caches, attending=attending)
    return _best(context_positions(segments), scores, count)


def in_all_layers(naive: NaiveLlama, selected: Iterable[int]) -> Schedule:
    """The schedule of a selection that is known beforehand (LegoLink)."""
    return [sorted(set(selected)) for _ in range(naive.num_layers)]


def from_layer_two(naive: NaiveLlama, segments: Segments, selected: Iterable[int]) -> Schedule:
    """The schedule of a selection made in layer 1: everything in layers 0 and 1, the selected tokens behind."""
    everything, chosen = context_positions(segments), sorted(set(selected))
    return [everything if layer <= SELECTION_LAYER else chosen for layer in range(naive.num_layers)]


def run_with_schedule(
    naive: NaiveLlama, segments: Segments, chunk_caches: Caches, rows_by_layer: Sequence[Iterable[int]]
) -> RivalPass:
    """The whole prompt with given rows per layer. Rows go on from their own hidden states, so they must be nested."""
    schedule = [sorted(set(rows)) for rows in rows_by_layer]
    if len(schedule) != naive.num_layers:
        raise ValueError(f"one list of rows for each of the {naive.num_layers} layers")
    if not set(schedule[0]) <= set(context_positions(segments)):
        raise ValueError("only chunk tokens can be scheduled")
    if any(not set(later) <= set(earlier) for earlier, later in itertools.pairwise(schedule)):
        raise ValueError("a dropped row cannot come back")

    def choose(view: LayerView) -> list[int]:
        return schedule[min(view.layer + 1, naive.num_layers - 1)]

    return _run(naive, segments, chunk_caches, schedule[0], choose)


def _selection_view(naive: NaiveLlama, segments: Segments, chunk_caches: Caches) -> LayerView:
    """Layer 1 with every row computed."""
    views = []

    def keep_all(view: LayerView) -> list[int]:
        views.append(view)
        return view.rows

    _run(naive, segments, chunk_caches, context_positions(segments), keep_all)
    return views[SELECTION_LAYER]


def _run(
    naive: NaiveLlama, segments: Segments, chunk_caches: Caches, first_rows: Iterable[int], choose: Choice
) -> RivalPass:
    """All layers; after each, `choose` says which of its chunk rows go on."""
    ids, fresh = prompt_ids(segments), fresh_positions(segments)
    suffix_positions(segments)  # raises where the prompt has no suffix
    stale_keys, stale_values = naive.assemble(segments, chunk_caches)
    keys, values = [layer.copy() for layer in stale_keys], [layer.copy() for layer in stale_values]
    rows = sorted(first_rows)
    hidden = {position: naive.embeddings[ids[position]] for position in sorted({*rows, *fresh})}
    schedule: Schedule = []
    for layer in range(naive.num_layers):
        schedule.append(rows)
        hidden, attention = _run_layer(naive, layer, hidden, keys[layer], values[layer])
        stale = stale_keys[layer], stale_values[layer]
        rows = sorted(choose(LayerView(layer, rows, keys[layer], values[layer], *stale, attention)))
        hidden = {position: state for position, state in hidden.items() if position in rows or position in fresh}
    charged = sum(len(computed) for computed in schedule)
    return RivalPass(naive._logits(hidden[len(ids) - 1]), keys, values, schedule, charged)


def _run_layer(
    naive: NaiveLlama, layer: int, hidden: Mapping[int, Array], keys: Array, values: Array
) -> tuple[dict[int, Array], Array]:
    """One layer for the rows in `hidden` (position -> state); `keys` (rotated) and `values` are written in place."""
    name, total = f"model.layers.{layer}.", keys.shape[1]
    num_heads, num_kv_heads, dim = naive.num_heads, naive.num_kv_heads, naive.head_dim
    queries: dict[int, Array] = {}
    for position, state in hidden.items():
        normed = naive._rms_norm(state, name + "input_layernorm")
        query = naive._linear(normed, name + "self_attn.q_proj").reshape(num_heads, dim)
        key = naive._linear(normed, name + "self_attn.k_proj").reshape(num_kv_heads, dim)
        place = np.array(position)
        queries[position] = naive._rotate(query * naive.attention_scaling, place)
        keys[:, position] = naive._rotate(key * naive.attention_scaling, place)
        values[:, position] = naive._linear(normed, name + "self_attn.v_proj").reshape(num_kv_heads, dim)
    attention = np.zeros((num_heads, total, total))
    out: dict[int, Array] = {}
    for position, state in hidden.items():
        mixed = []
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            logits = np.zeros(position + 1)
            for seen in range(position + 1):
                logits[seen] = queries[position][head] @ keys[kv_head, seen] / math.sqrt(dim)
            attention[head, position, : position + 1] = _softmax(logits)
            mixed.append(attention[head, position, : position + 1] @ values[kv_head, : position + 1])
        state = state + naive._linear(np.concatenate(mixed), name + "self_attn.o_proj")
        normed = naive._rms_norm(state, name + "post_attention_layernorm")
        gate = naive._linear(normed, name + "mlp.gate_proj")
        inner = gate / (1.0 + np.exp(-gate)) * naive._linear(normed, name + "mlp.up_proj")
        out[position] = state + naive._linear(inner, name + "mlp.down_proj")
    return out, attention


def _deviation(view: LayerView, position: int, variant: Variant) -> float:
    """Squared L2 distance between a token's fresh and stale V, K (rotated) or both, over KV heads and channels."""
    keys = float(((view.keys[:, position] - view.stale_keys[:, position]) ** 2).sum())
    values = float(((view.values[:, position] - view.stale_values[:, position]) ** 2).sum())
    return {"v": values, "k": keys, "kv": keys + values}[variant]


def _best(positions: Sequence[int], scores: Sequence[float] | Array, count: int) -> list[int]:
    """The `count` positions of the highest scores, ties to the lower one, sorted."""
    if not 0 <= count <= len(positions):
        raise ValueError(f"count is {count}, there are {len(positions)} tokens to choose from")
    ranked = sorted(zip(scores, positions, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return sorted(position for _, position in ranked[:count])
