"""Tools by the model's chat template: found out by rendering, calls read from what the model says."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain import ChatProphetKV
from prophetkv_rag.integrations.langchain.tool_calls import read_answer, shown_part
from prophetkv_rag.integrations.langchain.tool_format import find_tool_format
from tests.integrations.langchain.rag import TOWN, town_store
from tests.integrations.taught import CALL, TOWN_QUESTION, as_tools, taught_engine, tool_tokenizer

HEAD = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
)
TAIL = "<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
BARE = (  # as Llama 3 has it: no marker, other names
    '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", '
    '"parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}"
)
LISTED = (  # as Mistral has it: a special token and a list
    '{% if m.tool_calls %}<|endoftext|>[{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}{% endfor %}]{% endif %}'
)
REASONED = (  # as reasoning models have it: an empty thought, then a tag that begins like the thought's
    '{% for c in m.tool_calls or [] %}<think>\n\n</think>\n\n<tool_call>\n{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
XML = "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>{{ c.function.arguments | tojson }}{% endfor %}"


def tokenizer_with(template: str, end: str = TAIL) -> Any:
    tokenizer = tool_tokenizer()
    tokenizer.chat_template = HEAD + template + end
    return tokenizer


def test_formats_are_found_by_rendering() -> None:
    found = find_tool_format(tool_tokenizer())
    assert (found.marker, found.arguments_key) == ("<tool_call>", "arguments")
    assert found.forced_start("f") == '<tool_call>\n{"name": "f", "arguments": {'
    assert found.forced_start(None) == '<tool_call>\n{"name": "'
    bare = find_tool_format(tokenizer_with(BARE))
    assert (bare.marker, bare.arguments_key) == ("", "parameters")
    assert bare.forced_start("f", has_arguments=True) == '{"name": "f", "parameters": {"'
    listed = find_tool_format(tokenizer_with(LISTED))
    assert (listed.marker, listed.opening) == ("", "<|endoftext|>[")
    for end in (TAIL, TAIL.replace("<assistant>", "<assistant><think>\n")):
        assert find_tool_format(tokenizer_with(REASONED, end)).marker == "<tool_call>"


@pytest.mark.parametrize(
    ("template", "says"),
    [(HEAD.replace("{{ tool | tojson }}", "") + TAIL, "leaves tools out"), (HEAD + XML + TAIL, "not JSON")],
)
def test_other_templates_are_a_clear_error(template: str, says: str, fresh_engine: ProphetKVEngine) -> None:
    fresh_engine.tokenizer.chat_template = template
    model = ChatProphetKV(engine=fresh_engine)
    assert not model.supports_tools
    with pytest.raises(InputError, match=says):
        model.bind_tools(as_tools({"f": ()}))
    with pytest.raises(InputError, match=says):
        model.with_structured_output({"title": "T", "type": "object", "properties": {}})


@pytest.mark.parametrize("template", [None, BARE, LISTED, REASONED])
def test_calls_are_read_in_every_format(template: str | None) -> None:
    tokenizer = tool_tokenizer() if template is None else tokenizer_with(template)
    found = find_tool_format(tokenizer)
    calls = [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": "x } [", "b": [1]}}}]
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    written = tokenizer.apply_chat_template(messages, tools=as_tools({"f": ("a",)}), tokenize=False)
    text = written[written.rindex("assistant") + len("assistant>") :].replace("<|endoftext|>", "")
    answer = read_answer(text.replace("<|im_end|>", "").strip(), found, ["f"])
    assert [(call["name"], call["args"]) for call in answer.calls] == [("f", {"a": "x } [", "b": [1]})]
    assert answer.calls[0]["id"]


def test_what_small_models_write() -> None:
    found = find_tool_format(tool_tokenizer())

    def names(text: str) -> list[str]:
        return [call["name"] for call in read_answer(text, found, ["f", "g"]).calls]

    assert names("Well. " + CALL % ("f", "{}") + "\n" + CALL % ("g", "{}")) == ["f", "g"]
    assert names('{"name": "f", "arguments": {}}') == ["f"], "the marker was forgotten"
    assert names('```json\n{"name": "f", "arguments": {}}\n```') == ["f"], "a fence was put around it"
    assert names('{"name": "unknown", "arguments": {}}') == [], "an answer in JSON is no call"
    assert names('See {"name": "f", "arguments": {}}') == [], "an example in an answer is no call"
    text = read_answer("Text <tool_call>\n{broken", found, ["f"])
    assert (text.text, text.calls, text.invalid[0]["args"]) == ("Text", [], "{broken")
    bare = read_answer('<tool_call>{"name": "f", "arguments": 36}', found, ["f"])
    assert (bare.calls, bare.invalid[0]["name"], bare.invalid[0]["args"]) == ([], "f", "36")
    as_string = read_answer('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', found, ["f"])
    assert as_string.calls[0]["args"] == {"a": 1}


def test_a_stream_shows_no_piece_of_a_call() -> None:
    found, text = find_tool_format(tool_tokenizer()), "I look < here.\n" + CALL % ("f", "{}")
    shown = [shown_part(text[:size], found) for size in range(len(text) + 1)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert shown[-1] == "I look < here."
    assert not any("<tool" in part for part in shown)


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
