"""Libraries that hold an answer to a JSON schema: wheel size, time a token, and what of JSON Schema they keep.

    .venv/bin/python -m pip install llguidance xgrammar outlines-core
    .venv/bin/python benchmarks/structured.py

Every schema comes with an instance that is valid and one that is not. Fed token by token, a library is *right* about a
schema if it takes the first and not the second; it may also refuse the schema, which costs an error message, take
what is invalid, or not take what is valid. Libraries that are not installed are left out.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from prophetkv_rag.defaults import fetch_default_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def _object(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False, **more}


_TREE = {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "required": ["a"]}
_TREE["additionalProperties"] = False
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "object": (PERSON, {"name": "Ada", "age": 36, "tags": ["x"]}, {"name": "Ada", "age": "36", "tags": []}),
    "optional": (_object({"type": "string"}, required=[]), {}, {"b": "x"}),
    "enum": (_object({"enum": ["red", 2]}), {"a": 2}, {"a": "blue"}),
    "const": (_object({"const": "red"}), {"a": "red"}, {"a": "blue"}),
    "anyOf": (_object({"anyOf": [{"type": "null"}, {"type": "integer"}]}), {"a": None}, {"a": "x"}),
    "oneOf": (_object({"oneOf": [{"type": "null"}, {"type": "integer"}]}), {"a": 7}, {"a": "x"}),
    "allOf": (_object({"allOf": [{"type": "integer"}, {"minimum": 5}]}), {"a": 7}, {"a": 3}),
    "types": (_object({"type": ["string", "null"]}), {"a": None}, {"a": 1}),
    "pattern": (_object({"type": "string", "pattern": "^[A-Z]{2}[0-9]$"}), {"a": "AB1"}, {"a": "ab1"}),
    "date": (_object({"type": "string", "format": "date"}), {"a": "2024-02-29"}, {"a": "2024-13-01"}),
    "uuid": (
        _object({"type": "string", "format": "uuid"}),
        {"a": "123e4567-e89b-12d3-a456-426614174000"},
        {"a": "123e4567"},
    ),
    "email": (_object({"type": "string", "format": "email"}), {"a": "a@b.org"}, {"a": "a.b.org"}),
    "minLength": (_object({"type": "string", "minLength": 2}), {"a": "xy"}, {"a": "x"}),
    "maxLength": (_object({"type": "string", "maxLength": 2}), {"a": "xy"}, {"a": "xyz"}),
    "minimum": (_object({"type": "integer", "minimum": 5}), {"a": 17}, {"a": 4}),
    "maximum": (_object({"type": "number", "maximum": 1.5}), {"a": 1.25}, {"a": 2.5}),
    "exclusive": (_object({"type": "integer", "exclusiveMinimum": 5}), {"a": 6}, {"a": 5}),
    "multipleOf": (_object({"type": "integer", "multipleOf": 3}), {"a": 12}, {"a": 13}),
    "minItems": (_object({"type": "array", "items": {"type": "integer"}, "minItems": 2}), {"a": [1, 2]}, {"a": [1]}),
    "maxItems": (_object({"type": "array", "items": {"type": "integer"}, "maxItems": 1}), {"a": [1]}, {"a": [1, 2]}),
    "tuple": (
        _object({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False}),
        {"a": [1, "x"]},
        {"a": ["x", 1]},
    ),
    "map": ({"type": "object", "additionalProperties": {"type": "integer"}}, {"x": 1, "y": 2}, {"x": "1"}),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "integer"}}, "additionalProperties": False},
        {"k1": 1},
        {"x": 1},
    ),
    "ref": ({**_object({"$ref": "#/$defs/t"}), "$defs": {"t": {"type": "integer"}}}, {"a": 3}, {"a": "x"}),
    "recursion": ({**_TREE, "$defs": {"t": _TREE}}, {"a": [{"a": []}]}, {"a": [1]}),
    "minProperties": (
        {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
        {"x": 1},
        {},
    ),
    "uniqueItems": (
        _object({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}),
        {"a": [1, 2]},
        {"a": [1, 1]},
    ),
    "not": (_object({"type": "string", "not": {"const": "red"}}), {"a": "blue"}, {"a": "red"}),
    "if": (
        {
            **_object({"type": "integer"}),
            "if": {"properties": {"a": {"minimum": 5}}},
            "then": {"properties": {"a": {"multipleOf": 5}}},
        },
        {"a": 10},
        {"a": 7},
    ),
}

Step = Callable[[int], bool]
"""Makes the mask of the next token and takes a token; returns whether the mask allowed it."""


def llguidance(tokenizer: Any) -> Callable[[dict[str, Any]], Step]:
    """Return what starts an answer by the library of this name; as the two below."""
    from llguidance import LLMatcher, LLTokenizer

    shared = LLTokenizer(tokenizer.backend_tokenizer.to_str(), n_vocab=len(tokenizer), eos_token=tokenizer.eos_token_id)

    def start(schema: dict[str, Any]) -> Step:
        matcher = LLMatcher(shared, LLMatcher.grammar_from_json_schema(schema), log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())

        def step(token: int) -> bool:
            mask = matcher.compute_bitmask()
            return bool(mask[token // 8] >> token % 8 & 1) and matcher.consume_token(token)

        return step

    return start


def xgrammar(tokenizer: Any) -> Callable[[dict[str, Any]], Step]:
    """See `llguidance`."""
    import xgrammar as xgr

    info = xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    compiler = xgr.GrammarCompiler(info, cache_enabled=False)

    def start(schema: dict[str, Any]) -> Step:
        matcher = xgr.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
        mask = xgr.allocate_token_bitmask(1, info.vocab_size)

        def step(token: int) -> bool:
            matcher.fill_next_token_bitmask(mask)
            return bool(int(mask[0, token // 32]) >> token % 32 & 1) and matcher.accept_token(token)

        return step

    return start


def outlines_core(tokenizer: Any) -> Callable[[dict[str, Any]], Step]:
    """See `llguidance`."""
    from outlines_core import Guide, Index, Vocabulary, json_schema
    from outlines_core.kernels.torch import allocate_token_bitmask, fill_next_token_bitmask

    spelt: dict[bytes, list[int]] = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if text and "\ufffd" not in text and token not in tokenizer.all_special_ids:
            spelt.setdefault(text.encode(), []).append(token)
    vocabulary = Vocabulary(tokenizer.eos_token_id, spelt)

    def start(schema: dict[str, Any]) -> Step:
        regex = json_schema.build_regex_from_schema(json.dumps(schema))
        guide = Guide(Index(regex, vocabulary))
        mask = allocate_token_bitmask(len(tokenizer))

        def step(token: int) -> bool:
            fill_next_token_bitmask(guide, mask)
            if not int(mask[0, token // 32]) >> token % 32 & 1:
                return False
            if token != tokenizer.eos_token_id:
                guide.advance(token, return_tokens=False)
            return True

        return step

    return start


def takes(start: Callable[[dict[str, Any]], Step], schema: dict[str, Any], tokens: list[int]) -> bool:
    """Whether a library takes an answer's tokens for a schema."""
    step = start(schema)
    return all(step(token) for token in tokens)


def verdict(start: Callable[[dict[str, Any]], Step], case: tuple[dict[str, Any], Any, Any], tokenizer: Any) -> str:
    """Return what a library makes of a schema."""

    def ids(value: Any) -> Iterator[list[int]]:
        """The spellings of a value that libraries prefer."""
        for separators in ((", ", ": "), (",", ":")):
            text = json.dumps(value, separators=separators)
            yield [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    schema, valid, invalid = case
    try:
        if not any(takes(start, schema, tokens) for tokens in ids(valid)):
            return "too strict"
        return "too loose" if any(takes(start, schema, tokens) for tokens in ids(invalid)) else "right"
    except Exception:  # each library has errors of its own
        return "refused"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(fetch_default_model())
    text = json.dumps({"name": "Ada Lovelace of London", "age": 36, "tags": ["first", "to write programs"] * 8})
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    table = Table("library", "files", "needs", "tokenizer", "schema", "mask a token: median, worst", "JSON Schema")
    for make in (llguidance, xgrammar, outlines_core):
        name = make.__name__.replace("_", "-")
        try:
            package = importlib.metadata.distribution(name)
            began = time.perf_counter()
            start = make(tokenizer)
        except (ImportError, importlib.metadata.PackageNotFoundError):
            continue
        ready = time.perf_counter()
        step = start(PERSON)
        compiled, times = time.perf_counter(), []
        for token in tokens:
            before = time.perf_counter()
            assert step(token), f"{name} refuses {tokenizer.decode([token])!r}"
            times.append((time.perf_counter() - before) * 1e3)
        found = {key: verdict(start, case, tokenizer) for key, case in CASES.items()}
        size = sum(path.locate().stat().st_size for path in package.files or () if path.locate().is_file())
        others = {need.split(";")[0].strip() for need in package.requires or () if "extra ==" not in need}
        counts = "; ".join(
            f"{number} {kind}"
            + ("" if kind == "right" else f" ({', '.join(key for key in found if found[key] == kind)})")
            for kind, number in Counter(found.values()).most_common()
        )
        table.add_row(
            f"{name} {package.version}",
            f"{size / 1e6:.1f} MB",
            ", ".join(sorted(others)) or "nothing",
            f"{ready - began:.2f} s",
            f"{(compiled - ready) * 1e3:.1f} ms",
            f"{statistics.median(times):.3f}, {max(times):.2f} ms",
            counts,
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
