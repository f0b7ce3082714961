"""What an answer must look like, as a grammar in llguidance's notation (Lark's, with JSON schemas in it).

Nothing here needs the library; `constraint.py` holds answers to a grammar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prophetkv_rag.errors import InputError

_KNOWN_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
)
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as `json.dumps` writes it. Where white space is free, small models go on with it until their room is used up."""

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like: `engine.generate(prompt, grammar=Grammar.json_schema(schema))`.

    Attributes:
        source: The grammar: Lark's notation as llguidance reads it, with a rule `start`.
    """

    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """One JSON value that the schema allows, on one line; see `json_rule` for how the schema is read.

        Raises:
            InputError: If the schema is not an object of JSON.
        """
        return cls(f"start: {json_rule(schema)}\n")

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object, on one line."""
        return cls.json_schema({"type": "object"})


def literal(text: str) -> str:
    """Return a text as it stands in a grammar."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema as it stands in a grammar.

    What has properties is an object, and has no others than the schema names, in its order, unless it speaks of them
    (`additionalProperties`): models that may go on, go on. Formats that the library does not know say nothing, as the
    standard has it.

    Raises:
        InputError: If the schema is not an object of JSON.
    """
    if not isinstance(schema, Mapping):
        msg = f'a JSON schema must be an object, such as {{"type": "object", "properties": ...}}; got {schema!r}'
        raise InputError(msg)
    try:
        text = json.dumps(schema, allow_nan=False)  # what is not JSON, or has no end
        plain = json.loads(text)
        # Closed branches of these would exclude each other, or no longer do so.
        closes = '"allOf"' not in text and '"oneOf"' not in text
        return "%json " + json.dumps(_readable(plain, closes=closes) | {"x-guidance": _ONE_LINE})
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"the JSON schema is not JSON ({error}); give what json.dumps can write, such as a model_json_schema()"
        raise InputError(msg) from error


def _readable(schema: Any, *, closes: bool) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    if found.get("format") not in _KNOWN_FORMATS:
        found.pop("format", None)
    if "properties" in found and found.keys().isdisjoint({"$ref", "anyOf", "oneOf", "allOf"}):
        found.setdefault("type", "object")
        if closes and "patternProperties" not in found:
            found.setdefault("additionalProperties", False)
    for key in _MAPS:
        if isinstance(found.get(key), dict):
            found[key] = {name: _readable(inner, closes=closes) for name, inner in found[key].items()}
    for key in _LISTS:
        if isinstance(found.get(key), list):
            found[key] = [_readable(inner, closes=closes) for inner in found[key]]
    for key in _SINGLE:
        if key in found:
            found[key] = _readable(found[key], closes=closes)
    return found
