"""OpenAI's `response_format`: what an answer must look like, as a JSON schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prophetkv_rag.errors import InputError

_ALLOWED = (
    '{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}'
)


def response_schema(response_format: Any) -> dict[str, Any] | None:
    """Return the schema that a `response_format` asks for; `None` where any text will do.

    Raises:
        InputError: If it is none of OpenAI's forms.
    """
    fields: Mapping[str, Any] = response_format if isinstance(response_format, Mapping) else {}
    kind = "text" if response_format is None else fields.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    holder = fields.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        msg = f"response_format is {str(response_format)[:200]}; allowed: {_ALLOWED}"
        raise InputError(msg)
    return dict(schema)
