"""Tools by the model's chat template: found out by rendering, calls read from what the model says."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain import ChatProphetKV
from tests.integrations.langchain.rag import TOWN, town_store
from tests.integrations.taught import TOWN_QUESTION, as_tools, taught_engine


@pytest.mark.parametrize(
    ("called", "says"),
    [("", "leaves tools out"), ("{{ c.function.name }}({{ c.function.arguments }})", "not JSON")],
)
def test_other_templates_are_a_clear_error(called: str, says: str, fresh_engine: ProphetKVEngine) -> None:
    head = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" if called else ""
    head += "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    tail = "{% endfor %}<|im_end|>{% endfor %}<assistant>"
    fresh_engine.tokenizer.chat_template = head + called + tail
    model = ChatProphetKV(engine=fresh_engine, max_tokens=40)
    assert not model.supports_tools
    with pytest.raises(InputError, match=says):
        model.bind_tools(as_tools({"f": ()}))
    schema = {"title": "T", "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    assert model.with_structured_output(schema).invoke("Hi")["a"] in (1, 2), "which needs no tools"


def test_a_streamed_call_is_the_invoked_one() -> None:
    model = ChatProphetKV(engine=taught_engine()).bind_tools(as_tools({"search_town": ("query",)}))
    whole: Any = None
    for chunk in model.stream(TOWN_QUESTION):
        whole = chunk if whole is None else whole + chunk
    invoked = model.invoke(TOWN_QUESTION)
    assert whole.text == invoked.text == "I look."
    assert (
        [call["args"] for call in whole.tool_calls] == [{"query": "museum"}] == [c["args"] for c in invoked.tool_calls]
    )
    assert whole.response_metadata["finish_reason"] == "tool_calls"
    assert whole.response_metadata["normalized_finish_reason"] == "tool_call"


def test_a_tools_answer_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks stand behind the question, which asks in stage I from behind the prompt's end."""
    store, layouts = town_store(taught_engine()), []
    read = store.engine._reader.read

    def spy(*args: Any, **kwargs: Any) -> Any:
        layouts.append(read(*args, **kwargs))
        return layouts[-1]

    monkeypatch.setattr(store.engine._reader, "read", spy)
    call = {"name": "search_town", "args": {"query": "museum"}, "id": "1", "type": "tool_call"}
    model = ChatProphetKV(engine=store.engine, max_tokens=2)
    for runnable in (model, model.bind_tools(as_tools({"search_town": ("query",)}))):
        message = runnable.invoke(
            [
                HumanMessage(TOWN_QUESTION),
                AIMessage("", tool_calls=[call]),
                ToolMessage(f"{TOWN[1]}\n\n{TOWN[0]}", tool_call_id="1"),
            ]
        )
        assert [chunk["status"] for chunk in message.response_metadata["prophetkv"]["chunks"]] == ["hit", "hit"]
        assert store.engine.tokenizer.decode(layouts[-1].probe_ids) == TOWN_QUESTION


def test_choices() -> None:
    @tool
    def get_weather(location: str) -> str:
        """Get the weather."""
        return "Sun."

    model = ChatProphetKV(engine=taught_engine(), max_tokens=80)
    with pytest.raises(InputError, match="allowed: get_weather, any, auto, none"):
        model.bind_tools([get_weather], tool_choice="get_wether")
    free = model.bind_tools([get_weather])
    assert free.invoke("What is the weather in San Francisco, CA?").tool_calls[0]["args"] == {"location": "SF"}
    hidden = model.bind_tools([get_weather], tool_choice="none", max_tokens=4)
    message = hidden.invoke("What is the weather in San Francisco, CA?")
    assert not message.tool_calls
    assert message.usage_metadata["input_tokens"] == model.get_num_tokens_from_messages(
        [HumanMessage("What is the weather in San Francisco, CA?")]
    )


def test_tools_count_as_tokens() -> None:
    model, messages = ChatProphetKV(engine=taught_engine(), max_tokens=2), [HumanMessage("Hi")]
    tools = as_tools({"search_town": ("query",)})
    used = model.bind_tools(tools).invoke(messages).usage_metadata["input_tokens"]
    assert model.get_num_tokens_from_messages(messages, tools) == used > model.get_num_tokens_from_messages(messages)
