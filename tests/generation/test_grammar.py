"""Answers held to a grammar: always whole or said to be cut off, and otherwise what the model likes best."""

from __future__ import annotations

import json
import threading
from typing import Any

import jsonschema
import pytest
import torch

from prophetkv_rag import Grammar, InputError, ProphetKVEngine
from prophetkv_rag.defaults import fetch_default_model
from tests.tiny import CORPUS, tiny_llama, tiny_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "grey", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
    },
    "required": ["colour", "count", "tags"],
}
PROMPT = "Context:\n" + "\n\n".join(CORPUS[:3]) + "\n\nQuestion: How many planes?"


@pytest.fixture(scope="module")
def engine() -> ProphetKVEngine:
    made = ProphetKVEngine(tiny_llama(initializer_range=0.3), tiny_tokenizer())
    made.add_chunks(CORPUS[:3])
    return made


def is_whole(text: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except json.JSONDecodeError:
        return False
    return True


def test_sampled_answers_are_what_the_schema_says(engine: ProphetKVEngine) -> None:
    texts = set()
    for seed in range(12):
        answer = engine.generate(
            PROMPT, grammar=Grammar.json_schema(SCHEMA), temperature=1.5, seed=seed, max_new_tokens=200
        )
        assert answer.finish_reason == "stop"
        assert is_whole(answer.text), answer.text
        assert list(json.loads(answer.text)) == list(SCHEMA["properties"]), "in the schema's order, and no others"
        texts.add(answer.text)
    assert len(texts) > 6


def test_a_model_may_have_more_tokens_than_its_tokenizer() -> None:
    wide = ProphetKVEngine(tiny_llama(initializer_range=0.3, vocab_size=509), tiny_tokenizer())
    for seed in range(4):
        answer = wide.generate(PROMPT, grammar=Grammar.json_schema(SCHEMA), temperature=3.0, seed=seed)
        assert answer.finish_reason == "stop"
        assert is_whole(answer.text)
        assert max(answer.token_ids) < 480


def test_an_answer_that_is_cut_off_says_so(engine: ProphetKVEngine) -> None:
    grammar = Grammar.json_schema(SCHEMA)
    whole = engine.generate(PROMPT, grammar=grammar, max_new_tokens=200)
    size = len(whole.token_ids)
    assert is_whole(whole.text)
    for most in range(1, size + 2):
        answer = engine.generate(PROMPT, grammar=grammar, max_new_tokens=most)
        assert answer.token_ids == whole.token_ids[:most]
        assert whole.text.startswith(answer.text)
        assert answer.finish_reason == ("stop" if is_whole(answer.text) else "length")
        assert is_whole(answer.text) == (most >= size)


@pytest.mark.parametrize("question", ["How many planes?", "What opens at nine?", "Who?", "When was it learned?"])
def test_every_token_is_the_likeliest_that_may_stand_there(engine: ProphetKVEngine, question: str) -> None:
    """Against brute force: one full prefill of prompt and answer, and all spellings that a small schema allows."""
    values = [
        f"{what} shall be {how} in {year}" for what in CORPUS[0].split()[1:6] for how in "abcxyz" for year in "159"
    ]
    grammar = Grammar.json_schema({"enum": values})
    prompt = f"{PROMPT} {question}"
    answer = engine.generate(prompt, grammar=grammar, recompute_ratio=1.0)
    assert json.loads(answer.text) in values
    pieces = [engine.tokenizer.decode([token]) for token in range(480)]
    ids = engine.read(prompt).input_ids.tolist()
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*ids, *answer.token_ids]])).logits[0]
    text, num_chosen = "", 0
    for number, token in enumerate(answer.token_ids):
        left = [spelt[len(text) :] for spelt in map(json.dumps, values) if spelt.startswith(text)]
        may = [token for token in range(3, 480) if any(rest.startswith(pieces[token]) for rest in left)]
        assert token in may
        if len({rest[: len(pieces[token])] for rest in left}) > 1:
            at = len(ids) + number - 1
            assert token == max(may, key=lambda token: float(logits[at, token])), pieces[token]
            num_chosen += 1
        text += pieces[token]
    assert num_chosen >= 3


def test_what_is_forced_costs_no_pass_and_is_spelt_as_usual(engine: ProphetKVEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "a_rather_long_name": {"const": "and its value"}}}
    passes = []
    hook = engine.model.register_forward_pre_hook(lambda *_: passes.append(1))
    engine.generate("Hi", max_new_tokens=1)
    num_prefill = len(passes)
    answer = engine.generate("Hi", grammar=Grammar.json_schema(schema | {"required": list(schema["properties"])}))
    hook.remove()
    assert json.loads(answer.text)["a_rather_long_name"] == "and its value"
    assert len(answer.token_ids) > 15
    assert len(passes) == 2 * num_prefill + 1, "to choose between 1 and 2"
    assert list(answer.token_ids) == engine.tokenizer(answer.text)["input_ids"]


def test_reuse_stays_on(engine: ProphetKVEngine) -> None:
    free = engine.generate(PROMPT, max_new_tokens=4, remember=False).report
    held = engine.generate(PROMPT, max_new_tokens=4, grammar=Grammar.json_object(), remember=False).report
    assert held.reused_tokens == free.reused_tokens > 0
    assert held.recomputed_tokens == free.recomputed_tokens > 0
    assert [chunk.status for chunk in held.chunks] == ["hit"] * 3


@pytest.mark.parametrize("stop", ["}", '"', "red", ", "])
def test_a_stop_string_never_halves_an_answer(engine: ProphetKVEngine, stop: str) -> None:
    answer = engine.generate(PROMPT, grammar=Grammar.json_schema(SCHEMA), stop=stop, max_new_tokens=200)
    assert answer.finish_reason == "stop"
    assert is_whole(answer.text)


def test_a_stop_string_ends_free_text(engine: ProphetKVEngine) -> None:
    free = engine.generate(PROMPT, grammar=Grammar("start: /(.|\\n)*/"), max_new_tokens=30)
    stop = free.text[len(free.text) // 2 :][:2]
    answer = engine.generate(PROMPT, grammar=Grammar("start: /(.|\\n)*/"), stop=stop, max_new_tokens=30)
    assert (answer.text, answer.finish_reason) == (free.text[: free.text.index(stop)], "stop")


def test_a_stream_is_the_answer_in_pieces(engine: ProphetKVEngine) -> None:
    settings: dict[str, Any] = {"grammar": Grammar.json_schema(SCHEMA), "max_new_tokens": 200}
    pieces = list(engine.stream(PROMPT, **settings))
    assert "".join(piece.delta for piece in pieces) == engine.generate(PROMPT, **settings).text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert len(pieces) > 3
    cancel, got = threading.Event(), []
    for piece in engine.stream(PROMPT, cancel=cancel, **settings):
        got.append(piece)
        cancel.set()
    assert got[-1].finish_reason == "cancelled"


def test_how_schemas_are_read(engine: ProphetKVEngine) -> None:
    """Objects are closed unless they say otherwise; formats that nobody knows say nothing."""

    def answers(schema: dict[str, Any]) -> list[Any]:
        grammar = Grammar.json_schema(schema)
        found = (engine.generate(PROMPT, grammar=grammar, temperature=2.0, seed=seed) for seed in range(4))
        return [json.loads(answer.text) for answer in found if answer.finish_reason == "stop"]

    point = {"type": "object", "properties": {"x": {"type": "boolean"}}}
    for answer in answers({"type": "array", "items": point, "minItems": 3, "maxItems": 3}):
        assert all(set(item) <= {"x"} for item in answer)
    parts = [{"type": "object", "properties": {key: {"type": "boolean"}}, "required": [key]} for key in "xy"]
    engine._grammars.start(Grammar.json_schema({"allOf": parts}))  # closed, nothing would meet both
    assert answers({"type": "string", "format": "password", "maxLength": 3})
    assert all(isinstance(answer, dict) for answer in answers({"properties": {"x": {"type": "boolean"}}}))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: \\["uniqueItems"\\]'),
        ({"type": "object", "properties": {}, "required": ["a"]}, "required property 'a' is unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .* is greater than maximum"),
        ({"type": "text"}, "Invalid type: text"),
        ({"$ref": "#/$defs/nobody"}, "nobody"),
        ({"$ref": "https://example.org/schema.json"}, "not present"),
        ({"type": "string", "pattern": "(?=a)"}, "regex"),
        ({"default": {1, 2}}, "not JSON"),
        ({"default": float("nan")}, "not JSON"),
        ("string", "must be an object"),
    ],
)
def test_what_cannot_be_kept_is_refused(engine: ProphetKVEngine, schema: Any, says: str) -> None:
    passes = []
    hook = engine.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(InputError, match=says) as refused:
        engine.generate(PROMPT, grammar=Grammar.json_schema(schema))
    hook.remove()
    assert not passes, "before the model has run"
    assert "\n" not in str(refused.value)


def test_other_refusals(engine: ProphetKVEngine) -> None:
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"items": deep}
    with pytest.raises(InputError, match="not JSON"):
        Grammar.json_schema(deep)
    with pytest.raises(InputError, match="cannot be kept"):
        engine.generate(PROMPT, grammar=Grammar("start: nobody"))
    slow = ProphetKVEngine(tiny_llama(), None)
    with pytest.raises(InputError, match="NoneType; use a model whose tokenizer is a fast one"):
        list(slow.stream([1, 2], grammar=Grammar.json_object()))


@pytest.mark.model
def test_the_small_real_model() -> None:
    engine = ProphetKVEngine.from_pretrained(fetch_default_model(), dtype=torch.float32)
    chunks = ["The lighthouse on the island was built in 1862.", "The library was built in 1788, beside the river."]
    engine.add_chunks(chunks)
    prompt = [{"role": "user", "content": "\n\n".join(chunks) + "\n\nWhen was the lighthouse built? Answer in JSON."}]
    schema = {
        "type": "object",
        "properties": {"building": {"type": "string"}, "year": {"type": "integer"}},
        "required": ["building", "year"],
    }
    answer = engine.generate(prompt, grammar=Grammar.json_schema(schema), max_new_tokens=60, recompute_ratio=1.0)
    assert answer.finish_reason == "stop"
    assert json.loads(answer.text)["year"] == 1862
    assert [chunk.status for chunk in answer.report.chunks] == ["hit", "hit"]
    for most in (1, 9, 13):
        cut = engine.generate(prompt, grammar=Grammar.json_object(), max_new_tokens=most)
        assert cut.finish_reason == "length"
