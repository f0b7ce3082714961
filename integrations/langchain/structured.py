"""`with_structured_output`: answers that are JSON by construction, parsed; half an answer is an error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from operator import itemgetter
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from prophetkv_rag.errors import InputError

METHODS = ("json_schema", "function_calling", "json_mode")


def structured_output(
    model: BaseChatModel, schema: Any, *, method: str, include_raw: bool, more: dict[str, Any]
) -> Runnable[Any, Any]:
    """Return a chain of the model and a parser; see `ChatProphetKV.with_structured_output`."""
    if method not in METHODS:
        msg = f"method is {method!r}; allowed: {', '.join(METHODS)}"
        raise InputError(msg)
    if schema is None and method != "json_mode":
        msg = f"method {method!r} needs a schema; give one, or method='json_mode'"
        raise InputError(msg)
    traced = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema or {}}, **more}
    is_model = is_basemodel_subclass(schema)
    parser: BaseOutputParser[Any]
    if method == "function_calling":
        bound = model.bind_tools([schema], tool_choice="any", parallel_tool_calls=False, **traced)
        if is_model:
            parser = PydanticToolsParser(tools=[schema], first_tool_only=True)
        else:
            name = convert_to_openai_tool(schema)["function"]["name"]
            parser = JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
    else:
        bound = model.bind(response_format=_response_format(schema, method), **traced)
        parser = PydanticOutputParser(pydantic_object=schema) if is_model else JsonOutputParser()
    parsed = RunnableGenerator(_whole, _awhole) | parser
    if not include_raw:
        return bound | parsed
    assigned = RunnablePassthrough.assign(parsed=itemgetter("raw") | parsed, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | assigned.with_fallbacks([failed], exception_key="parsing_error")


def _response_format(schema: Any, method: str) -> dict[str, Any]:
    if method == "json_mode":
        return {"type": "json_object"}
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        plain = schema.model_json_schema()
    elif isinstance(schema, dict) and not {"function", "parameters"} & schema.keys():
        plain = schema  # a JSON schema already; a tool's description is not
    else:
        plain = convert_to_json_schema(schema)
    return {"type": "json_schema", "json_schema": {"name": str(plain.get("title", "answer")), "schema": plain}}


def _check(message: AIMessage) -> AIMessage:
    """Raise for an answer that was cut off, which parsers would take for a whole one."""
    reason = message.response_metadata.get("finish_reason")
    if reason not in (None, "stop", "tool_calls"):
        msg = f"the answer was cut off (finish reason {reason!r}), so it is no whole JSON; raise max_tokens or timeout"
        raise OutputParserException(msg, llm_output=str(message.content))
    return message


def _whole(messages: Iterator[AIMessage]) -> Iterator[AIMessage]:
    yield from map(_check, messages)


async def _awhole(messages: AsyncIterator[AIMessage]) -> AsyncIterator[AIMessage]:
    async for message in messages:
        yield _check(message)
