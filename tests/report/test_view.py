"""The view of a prompt: token texts that join, marks and scores that agree with the report and with stage I itself."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.report.view import PromptView, ViewedChunk, token_texts
from prophetkv_rag.reuse.assemble import assemble_caches
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

CHUNKS = [
    text_of(50, seed=1) + " 日本語のテキスト, 👩‍👩‍👧 and é",
    "Ünïcode first, <|im_end|> as text; " + text_of(40, seed=2),
    text_of(30, seed=3),
]
PROMPT = Prompt("Read this. ", CHUNKS, "\nWhat is said of 日本? 👍", glue="\n\n")


@pytest.fixture
def engine() -> ProphetKVEngine:
    engine = ProphetKVEngine(tiny_llama(initializer_range=0.3), tiny_tokenizer())
    engine.add_chunks(CHUNKS[:2])
    return engine


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Decodes as Llama 2's does: a token per byte of unknown characters, and a text's first space dropped."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz."]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("▁c", "a"), ("▁ca", "t")]
    pieces += [left + right for left, right in merges]
    tokenizer = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    "text", ["the cat. the cat", "the 👩‍👩‍👧 cat 日本語 é.", "日本", "\ufffd the", "👍", "a \ufffd\ufffd b", ""]
)
@pytest.mark.parametrize("make", [tiny_tokenizer, byte_fallback_tokenizer])
def test_token_texts_join_to_the_text(make: Callable[[], Any], text: str) -> None:
    tokenizer = make()

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_texts(decode, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == decode(ids) == text
    if "\ufffd" not in text:  # no half characters
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_chunk_cut_inside_a_character_still_joins() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("abc 👍", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(token_texts(tokenizer.decode, ids)) == tokenizer.decode(ids)


def test_a_decoder_that_looks_further_back_joins_all_the_same() -> None:
    """Three tokens make one character here, and one or two look like something else meanwhile."""

    def decode(ids: Sequence[int]) -> str:
        return "3" * (len(ids) // 3) + "ab"[: len(ids) % 3]

    for count in range(8):
        pieces = token_texts(decode, list(range(count)))
        assert len(pieces) == count
        assert "".join(pieces) == decode(list(range(count)))


def test_segments_are_the_prompt_in_order(engine: ProphetKVEngine) -> None:
    view = engine.prefill(PROMPT).view()
    kinds = [segment.kind for segment in view.segments]
    assert kinds == ["prefix", "chunk", "glue", "chunk", "glue", "chunk", "suffix"]
    chunks = [segment for segment in view.segments if segment.kind == "chunk"]
    assert [segment.text for segment in chunks] == CHUNKS
    assert view.segments[0].text == PROMPT.prefix
    assert view.segments[2].text == "\n\n"
    assert view.segments[-1].text == PROMPT.suffix
    for segment in view.segments:
        assert "".join(token.text for token in segment.tokens) == segment.text
        assert (segment.key is None) == (segment.kind != "chunk")
    assert [segment.status for segment in chunks] == ["hit", "hit", "miss"]
    assert sum(len(segment.tokens) for segment in view.segments) == len(view.token_ids)


@pytest.mark.parametrize(
    ("strategy", "ratio", "has_scores"),
    [
        ("prophetkv", 0.2, True),
        ("prophetkv", 1.0, False),
        ("prophetkv", 0.0, False),
        ("cacheblend", 0.3, False),
        ("full_prefill", 0.2, False),
        ("full_reuse", 0.2, False),
    ],
)
@pytest.mark.parametrize("suffix", [PROMPT.suffix, ""])
def test_marks_agree_with_the_report(
    engine: ProphetKVEngine, strategy: str, ratio: float, has_scores: bool, suffix: str
) -> None:
    prompt = Prompt(PROMPT.prefix, CHUNKS, suffix, query="What is said?")
    result = engine.prefill(prompt, strategy=strategy, recompute_ratio=ratio)
    tokens = [(segment.kind, token) for segment in result.view().segments for token in segment.tokens]
    assert sum(token.recomputed for _, token in tokens) == result.report.recomputed_tokens
    assert all(kind == "chunk" for kind, token in tokens if token.recomputed)
    assert all((token.score is not None) == (has_scores and kind == "chunk") for kind, token in tokens)
    rows = [row for row, (_, token) in enumerate(tokens) if token.recomputed]
    assert set(result.recomputed.tolist()) <= set(rows)


def test_scores_are_those_of_stage_one(engine: ProphetKVEngine) -> None:
    """Against a pass of its own over the same caches, and against what was selected by them."""
    result = engine.prefill(PROMPT, recompute_ratio=0.2)
    layout = engine.read(PROMPT)
    caches = engine.library.load(layout).caches
    layers = assemble_caches(
        engine.support,
        caches,
        [chunk.start for chunk in layout.chunks],
        layout.num_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        expected = engine.query_context(PROMPT, layers).attention_scores().numpy()
    tokens = [token for segment in result.view().segments for token in segment.tokens]
    scored = [(row, token) for row, token in enumerate(tokens) if token.score is not None]
    assert len(scored) == layout.num_chunk_tokens
    assert [token.score for _, token in scored] == pytest.approx([float(expected[row]) for row, _ in scored], rel=1e-4)
    lowest_picked = min(token.score for _, token in scored if token.recomputed)
    assert all(token.recomputed for _, token in scored if token.score > lowest_picked)


def test_a_prompt_without_chunks_is_one_suffix(engine: ProphetKVEngine) -> None:
    report = engine.generate("Nothing known here.", max_new_tokens=2).report
    assert [(segment.kind, segment.status) for segment in report.view.segments] == [("suffix", "fresh")]


def test_token_ids_without_a_tokenizer() -> None:
    engine = ProphetKVEngine(tiny_llama(), None)
    view = engine.prefill(Prompt([5, 6], [[7, 8, 9]], [10])).view()
    assert [segment.text for segment in view.segments] == ["<5><6>", "<7><8><9>", "<10>"]


def test_the_view_stays_out_of_data(engine: ProphetKVEngine) -> None:
    report = engine.prefill(PROMPT).report
    assert report.view is not None
    assert "view" not in report.to_dict()
    assert "view" not in repr(report)
    json.dumps(report.to_dict())
    for twin in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
        assert twin == report
        assert twin.view is None
        assert "no longer holds its prompt" in twin.to_html()


def test_the_view_is_json(engine: ProphetKVEngine) -> None:
    found = json.loads(json.dumps(engine.prefill(PROMPT).view().to_dict()))
    token = found["segments"][1]["tokens"][0]
    assert set(token) == {"text", "score", "recomputed"}


def test_nothing_is_decoded_until_somebody_looks(engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    decode = type(engine.tokenizer).decode

    def counting(self: Any, *args: Any, **options: Any) -> str:
        calls.append(1)
        return decode(self, *args, **options)

    monkeypatch.setattr(type(engine.tokenizer), "decode", counting)
    view = engine.prefill(PROMPT).view()
    assert not calls
    assert view.segments
    assert calls


def test_a_report_keeps_no_tensor_alive(engine: ProphetKVEngine) -> None:
    result = engine.prefill(PROMPT)
    report, cache = result.report, weakref.ref(result.past_key_values)
    tensors = [weakref.ref(result.input_ids), weakref.ref(result.recomputed), weakref.ref(result.logits)]
    del result
    gc.collect()
    assert cache() is None
    assert [tensor() for tensor in tensors] == [None, None, None]
    for array in (report.view.scores, report.view.token_ids, report.view.recomputed):
        assert isinstance(array, np.ndarray)
        assert array.flags.owndata  # not a window on a tensor's memory


def test_writing_into_the_results_ids_does_not_change_the_view(engine: ProphetKVEngine) -> None:
    result = engine.prefill(PROMPT)
    before = result.view().token_ids.copy()
    result.input_ids.fill_(0)
    assert (result.view().token_ids == before).all()


def test_shades_go_by_rank() -> None:
    scores = np.linspace(0.0, 1.0, 101, dtype=np.float32)
    view = PromptView(np.arange(101), [ViewedChunk("k", 0, 101, "hit")], scores, np.arange(0), None)
    given = (None, 0.0, 0.3, 0.6, 0.75, 0.85, 0.93, 0.96, 1.0)
    assert [view.shade(score) for score in given] == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert PromptView(np.arange(3), [], None, np.arange(0), None).shade(0.5) == 0


def test_full_row_scores_are_shown_too() -> None:
    config = ProphetKVConfig(score_softmax="full_row", query_scope="question")
    engine = ProphetKVEngine(tiny_llama(initializer_range=0.3), tiny_tokenizer(), config=config)
    view = engine.prefill(PROMPT).view()
    assert sum(token.score or 0.0 for segment in view.segments for token in segment.tokens) > 0
