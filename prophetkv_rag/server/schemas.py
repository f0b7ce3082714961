"""Request bodies. Types are strict, unknown fields are ignored, and what cannot be done is an error, not ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from prophetkv_rag.prompt import content_text
from prophetkv_rag.text import well_formed, well_formed_parts
from prophetkv_rag.tools import check_choice, check_tools, response_schema

Namespace = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
"""Who refers to chunks: the cache of a chunk lives as long as one namespace (or local collection) has it.

Of a chat: whose conversations go on from each other.
"""

_MAX_STOPS = 16
_TOO_DEEP = "is nested too deeply"


def _encodable(text: str) -> str:
    if well_formed(text) != text:
        msg = "is not valid Unicode (half of a surrogate pair)"
        raise ValueError(msg)
    return text


Text = Annotated[str, AfterValidator(well_formed)]
"""What a model reads. JSON can spell half a surrogate pair (text cut off inside an emoji), which no tokenizer reads."""

Name = Annotated[str, AfterValidator(_encodable)]
"""What is compared with something: changed, it would mean something else."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class ChatMessage(_Body):
    """One message; a content of several text parts is joined by line breaks.

    Of what an assistant said earlier, in a history that other models may have written, nothing is refused.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None
    tool_call_id: Any = None
    name: Any = None

    @field_validator("content")
    @classmethod
    def _to_text(cls, content: Any, info: ValidationInfo) -> str:
        try:
            return well_formed(content_text(content, info.data.get("role", "user")))
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None

    @field_validator("refusal", "tool_calls", "function_call", "tool_call_id", "name")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        try:
            json.dumps(value)  # what nests too deeply for a template
            return well_formed_parts(value)
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None

    def for_template(self) -> dict[str, Any]:
        """What the engine fits to the model's chat template."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        own: tuple[str, ...] = {
            "assistant": ("refusal", "tool_calls", "function_call"),
            "tool": ("tool_call_id", "name"),
        }.get(role, ())
        given = {key: getattr(self, key) for key in own}
        return {"role": role, "content": self.content} | {key: value for key, value in given.items() if value}


class StreamOptions(_Body):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class ReuseOptions(_Body):
    """Our own extension of a chat request."""

    strategy: Name | None = None
    recompute_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    query: Text | None = None
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    remember: bool | None = None
    namespace: Namespace | None = None


class ChatRequest(_Body):
    """Body of `POST /v1/chat/completions`."""

    model: Name
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Name | list[Name] | None = None
    n: int | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    response_format: dict[str, Any] | None = None
    prophetkv: ReuseOptions | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> list[str]:
        found = [stop] if isinstance(stop, str) else stop or []
        if len(found) > _MAX_STOPS or not all(found):
            msg = f"must be at most {_MAX_STOPS} strings, none empty"
            raise ValueError(msg)
        return found

    @field_validator("n")
    @classmethod
    def _check_n(cls, n: int | None) -> int | None:
        if n not in (None, 1):
            msg = "only 1 answer a request is supported; send the request again for another"
            raise ValueError(msg)
        return n

    @field_validator("logprobs")
    @classmethod
    def _check_logprobs(cls, logprobs: bool | None) -> bool | None:
        if logprobs:
            msg = "log probabilities are not supported; leave this out"
            raise ValueError(msg)
        return logprobs

    @field_validator("functions")
    @classmethod
    def _check_functions(cls, functions: Any) -> Any:
        if functions:
            msg = "functions are not supported; give them as tools"
            raise ValueError(msg)
        return functions

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[Any] | None) -> list[Any] | None:
        try:
            return check_tools(well_formed_parts(tools)) if tools else None
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None

    @field_validator("tool_choice")
    @classmethod
    def _check_choice(cls, choice: Any, info: ValidationInfo) -> Any:
        names = [tool["function"]["name"] for tool in info.data.get("tools") or ()]
        if "tools" in info.data and check_choice(choice, names) is not None and not names:
            msg = f"tool_choice is {choice!r}, but there are no tools; give them, or leave this out"
            raise ValueError(msg)
        return choice

    @field_validator("response_format")
    @classmethod
    def _check_format(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        response_schema(value)
        return value


class PutChunks(_Body):
    """Body of `PUT /v1/chunks`; `in_order` says that the chunks are a document, in order (docs/encodings.md)."""

    chunks: Annotated[list[Text], Field(min_length=1)]
    in_order: bool = False
    namespace: Namespace = "default"


class DeleteChunks(_Body):
    """Body of `DELETE /v1/chunks`: which chunks, by key or by text, or all of the namespace."""

    keys: list[str] = []
    chunks: list[Text] = []
    all: bool = False
    namespace: Namespace = "default"
