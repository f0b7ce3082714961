"""`ChatProphetKV` and `ProphetKVLLM` as objects: settings, messages, usage, token counts, copies, serialised forms."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, ChatMessage, FunctionMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from pydantic import ValidationError

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain import ChatProphetKV, ProphetKVLLM
from prophetkv_rag.integrations.langchain.messages import to_template_messages
from tests.integrations.langchain.rag import CallLog
from tests.integrations.rag import TEXTS
from tests.tiny import save_tiny

STRICT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}"
    "{% endfor %}"
)


@pytest.fixture
def model(chat_engine: ProphetKVEngine) -> ChatProphetKV:
    return ChatProphetKV(engine=chat_engine, max_tokens=6)


@pytest.fixture
def seen(chat_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """(prompt, settings) of every call that reaches the engine."""
    calls = []
    real = chat_engine.stream

    def spy(prompt: Any, **settings: Any) -> Any:
        calls.append((prompt, settings))
        return real(prompt, **settings)

    monkeypatch.setattr(chat_engine, "stream", spy)
    return calls


def test_a_call_overrides_the_fields(model: ChatProphetKV, seen: list[Any]) -> None:
    model.invoke("Hi", stop=["x"], max_tokens=2, temperature=0.5, top_p=0.9, seed=7, recompute_ratio=1.0, timeout=60)
    assert seen[0][1] == {
        "max_new_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "strategy": None,
        "recompute_ratio": 1.0,
        "deadline_s": 60,
        "remember": None,
        "tenant": "",
        "stop": ["x"],
        "cancel": None,
        "query": None,
    }
    ChatProphetKV(engine=model.engine, stop=["y"], strategy="full_prefill", timeout=9).bind(max_tokens=3).invoke("Hi")
    assert {"max_new_tokens": 3, "stop": ["y"], "strategy": "full_prefill", "deadline_s": 9}.items() <= seen[1][
        1
    ].items()


def test_configurable_fields_keep_the_engine(model: ChatProphetKV, seen: list[Any]) -> None:
    chosen = model.configurable_fields(temperature=ConfigurableField(id="t"))
    chosen.invoke("Hi", {"configurable": {"t": 0.25}})
    assert seen[0][1]["temperature"] == 0.25


def test_wrong_settings_say_what_to_do(model: ChatProphetKV, completion_engine: ProphetKVEngine) -> None:
    with pytest.raises(InputError, match="from_pretrained"):
        ChatProphetKV()
    with pytest.raises(InputError, match=r"did you mean recompute_ratio"):
        ChatProphetKV(engine=model.engine, recompute_ration=0.5)
    with pytest.raises(InputError, match=r"no chat template.*ProphetKVLLM"):
        ChatProphetKV(engine=completion_engine)
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"recompute_ratio": 1.5}, {"max_tokens": 0}):
        with pytest.raises(ValidationError):
            ChatProphetKV(engine=model.engine, **wrong)
    with pytest.raises(InputError, match=r"threading\.Event"):
        model.invoke("Hi", cancel=True)


def test_messages_reach_the_template_with_their_roles() -> None:
    call = {"name": "f", "args": {"a": 1}, "id": "1", "type": "tool_call"}
    messages = [
        SystemMessage("S"),
        HumanMessage([{"type": "text", "text": "one"}, "two"]),
        AIMessage([{"type": "text", "text": "T"}, {"type": "tool_use", "id": "1", "name": "f"}], tool_calls=[call]),
        ToolMessage("R", tool_call_id="1", name="f"),
        FunctionMessage("F", name="g"),
        ChatMessage("C", role="critic"),
    ]
    assert to_template_messages(messages) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "content": "T",
            "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "R", "tool_call_id": "1", "name": "f"},
        {"role": "tool", "content": "F", "name": "g"},
        {"role": "critic", "content": "C"},
    ]


def test_images_are_refused(model: ChatProphetKV) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(InputError, match="text only"):
        model.invoke([HumanMessage([{"type": "text", "text": "look"}, image])])


def test_strict_templates_get_alternating_roles(
    model: ChatProphetKV, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.engine.tokenizer, "chat_template", STRICT_TEMPLATE)
    model.invoke([SystemMessage("Be kind."), HumanMessage("Hi"), HumanMessage("there")])
    assert model.engine.tokenizer.decode(model.engine.read(seen[0][0]).input_ids) == "<user>Be kind.\n\nHi\n\nthere"


def test_usage_and_report_agree_with_what_ran(model: ChatProphetKV) -> None:
    model.engine.add_chunks(TEXTS)
    message = model.invoke(f"{TEXTS[0]}\n\n{TEXTS[1]}\n\nWhen does the museum open?")
    report, details = message.response_metadata["prophetkv"], message.usage_metadata["input_token_details"]
    length = sum(len(model.engine.tokenizer(text)["input_ids"]) for text in TEXTS[:2])
    assert details["cache_read"] + details["recomputed"] == length == report["chunk_tokens"]
    assert 0 < details["recomputed"] < length
    assert message.usage_metadata["output_tokens"] <= 6
    assert message.response_metadata["finish_reason"] in ("stop", "length")
    assert json.loads(json.dumps(message.response_metadata)) == message.response_metadata
    assert model.last_report.to_dict() == report


@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_streams_end_with_the_usage(kind: str, chat_engine: ProphetKVEngine) -> None:
    log = CallLog()
    if kind == "chat":
        model = ChatProphetKV(engine=chat_engine, max_tokens=6)
        chunks = list(model.stream("Hi", {"callbacks": [log]}))
        assert [bool(chunk.usage_metadata) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].response_metadata["prophetkv"] == log.reports[0]
        assert "".join(chunk.text for chunk in chunks) == model.invoke("Hi").text
        assert "".join([chunk.text async for chunk in model.astream("Hi")]) == model.invoke("Hi").text
    else:
        llm = ProphetKVLLM(engine=chat_engine, max_tokens=6)
        assert "".join(llm.stream("Hi", {"callbacks": [log]})) == llm.invoke("Hi") == await llm.ainvoke("Hi")
        assert "".join([piece async for piece in llm.astream("Hi")]) == llm.invoke("Hi")
        result = llm.generate(["Hi", "Ho"])
        assert len(log.reports) == 1
        assert [r["prompt_tokens"] for r in result.llm_output["prophetkv"]] == [
            g[0].generation_info["usage_metadata"]["input_tokens"] for g in result.generations
        ]
        assert result.llm_output["token_usage"]["total_tokens"] == sum(
            g[0].generation_info["usage_metadata"]["total_tokens"] for g in result.generations
        )


def test_stop_strings_end_the_answer(model: ChatProphetKV) -> None:
    whole = ChatProphetKV(engine=model.engine, max_tokens=40).invoke("Hi").text
    stop = whole[len(whole) // 2 :][:2]
    message = model.invoke("Hi", stop=[stop], max_tokens=40)
    assert message.text == whole[: whole.index(stop)]
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.response_metadata["normalized_finish_reason"] == "stop"


def test_tokens_are_counted_by_the_models_own_tokenizer(model: ChatProphetKV) -> None:
    assert model.get_num_tokens(TEXTS[0]) == len(model.engine.tokenizer(TEXTS[0])["input_ids"])
    messages = [SystemMessage("Be kind."), HumanMessage("Hi")]
    assert model.get_num_tokens_from_messages(messages) == model.invoke(messages).usage_metadata["input_tokens"]
    assert ProphetKVLLM(engine=model.engine).get_num_tokens("Hi there") == model.get_num_tokens("Hi there")


def test_the_completion_model_wraps_prompts_or_not(chat_engine: ProphetKVEngine, seen: list[Any]) -> None:
    ProphetKVLLM(engine=chat_engine, max_tokens=2).invoke("Hi")
    ProphetKVLLM(engine=chat_engine, max_tokens=2, use_chat_template=False).invoke("Hi")
    assert [prompt for prompt, _ in seen] == [[{"role": "user", "content": "Hi"}], "Hi"]


@pytest.mark.parametrize("cls", [ChatProphetKV, ProphetKVLLM])
def test_copies_share_the_engine_and_pickles_leave_it_out(cls: Any, chat_engine: ProphetKVEngine) -> None:
    model = cls(engine=chat_engine, max_tokens=3)
    for twin in (copy.deepcopy(model), copy.copy(model), model.model_copy(update={"max_tokens": 2})):
        assert twin.engine is chat_engine
    data = pickle.dumps(model)
    assert len(data) < 10_000, "weights were pickled"
    again = pickle.loads(data)
    assert again.max_tokens == 3
    with pytest.raises(InputError, match=r"set model\.engine"):
        again.invoke("Hi")
    again.engine = chat_engine
    assert again.invoke("Hi") is not None


@pytest.mark.parametrize("cls", [ChatProphetKV, ProphetKVLLM])
def test_serialised_forms_hold_settings_only(cls: Any, chat_engine: ProphetKVEngine) -> None:
    model = cls(engine=chat_engine, max_tokens=3, api_key="secret-key")
    model.invoke("Hi")
    chain = ChatPromptTemplate.from_template("{x}") | model
    as_dict = getattr(model, "asdict", None) or model.dict  # its name in langchain-core before 1.5
    for form in (dumps(model), dumps(chain), repr(model), model.model_dump_json(), json.dumps(as_dict())):
        assert "secret-key" not in form
        assert "tensor" not in form.lower()
        assert "engine=" not in form
        assert len(form) < 10_000


def test_langchains_cache_goes_by_settings_and_weights(model: ChatProphetKV, seen: list[Any]) -> None:
    cached = ChatProphetKV(engine=model.engine, max_tokens=2, cache=InMemoryCache())
    first = cached.invoke("Hi")
    assert cached.invoke("Hi").text == first.text
    assert len(seen) == 1
    cached.invoke("Hi", recompute_ratio=0.5)
    cached.model_copy(update={"max_tokens": 3}).invoke("Hi")
    assert len(seen) == 3


def test_from_pretrained_makes_its_own_engine(tmp_path: Any) -> None:
    model = ChatProphetKV.from_pretrained(save_tiny(tmp_path / "tiny-model"), max_tokens=3)
    assert model.model_name == "tiny-model"
    assert model.profile["max_input_tokens"] == model.engine.context_window
    assert model.invoke("Hi").usage_metadata["output_tokens"] <= 3
