"""`ProphetKVLLM` as an object: its fields, per-call arguments, message formats, copies and serialised form."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.llms import CustomLLM
from pydantic import ValidationError

from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from prophetkv_rag.report.report import ReuseReport
from tests.tiny import save_tiny


@pytest.fixture
def seen(llm: ProphetKVLLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """(prompt, options) of every call that reaches the engine's `generate`."""
    calls = []
    real = llm.engine.generate

    def spy(prompt: Any, **options: Any) -> Any:
        calls.append((prompt, options))
        return real(prompt, **options)

    monkeypatch.setattr(llm.engine, "generate", spy)
    return calls


def test_metadata_follows_the_engine(chat_engine: ProphetKVEngine, completion_engine: ProphetKVEngine) -> None:
    llm = ProphetKVLLM(engine=chat_engine, max_new_tokens=12)
    assert llm.metadata.is_chat_model
    assert not ProphetKVLLM(engine=completion_engine).metadata.is_chat_model
    assert llm.metadata.num_output == 12
    assert llm.metadata.model_name
    window = chat_engine.context_window
    assert ProphetKVLLM(engine=completion_engine).metadata.context_window == window
    # What the template writes around a system and a user message of one token each is not LlamaIndex's to fill.
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
    around = len(chat_engine.read(chat).input_ids) - 2
    assert around > 0
    assert llm.metadata.context_window == window - around
    short = ProphetKVLLM(engine=chat_engine, context_window=512, model_name="m")
    assert short.metadata.context_window == 512 - around
    too_long = ProphetKVLLM(engine=chat_engine, context_window=window + 1)
    assert too_long.metadata.context_window == window - around


def test_per_call_arguments_override_the_fields(llm: ProphetKVLLM, seen: list[Any]) -> None:
    llm.complete("Hi", max_tokens=2, temperature=0.5, top_p=0.9, stop="x", seed=7, recompute_ratio=1.0, tools=[])
    assert seen[0][1] == {
        "max_new_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["x"],
        "seed": 7,
        "strategy": None,
        "recompute_ratio": 1.0,
        "deadline_s": None,
        "cancel": None,
        "remember": None,
        "tenant": "",
    }
    llm.complete("Hi", max_new_tokens=3, max_tokens=9, strategy="full_prefill", temperature=None)
    assert seen[1][1]["max_new_tokens"] == 3
    assert seen[1][1]["strategy"] == "full_prefill"
    assert seen[1][1]["temperature"] == llm.temperature == 0.0


def test_complete_wraps_a_prompt_for_a_chat_model(llm: ProphetKVLLM, seen: list[Any]) -> None:
    llm.complete("Hi")
    llm.complete("<|im_start|>user\nHi<|im_end|>\n", formatted=True)
    assert [prompt for prompt, _ in seen] == [[{"role": "user", "content": "Hi"}], "<|im_start|>user\nHi<|im_end|>\n"]


def test_complete_takes_a_prompt_as_it_is_without_a_template(completion_engine: ProphetKVEngine) -> None:
    llm = ProphetKVLLM(engine=completion_engine, max_new_tokens=4)
    assert llm.complete("Hi").text == completion_engine.generate("Hi", max_new_tokens=4).text
    assert llm.chat([ChatMessage(content="Hi")]).message.content == llm.complete("user: Hi\nassistant: ").text


def test_own_prompt_functions_are_used(chat_engine: ProphetKVEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []
    real = chat_engine.generate
    monkeypatch.setattr(chat_engine, "generate", lambda prompt, **kw: prompts.append(prompt) or real(prompt, **kw))
    llm = ProphetKVLLM(
        engine=chat_engine,
        max_new_tokens=2,
        messages_to_prompt=lambda messages: "|".join(str(m) for m in messages),
        completion_to_prompt=lambda text: f"<{text}>",
    )
    llm.chat([ChatMessage(content="Hi")])
    llm.complete("Hi")
    llm.complete("Hi", formatted=True)
    assert prompts == ["user: Hi", "<Hi>", "Hi"]


def test_system_prompt_reaches_predict(chat_engine: ProphetKVEngine, call_log: Any) -> None:
    from llama_index.core import PromptTemplate

    llm = ProphetKVLLM(engine=chat_engine, max_new_tokens=2, system_prompt="Be brief.")
    llm.predict(PromptTemplate("{query_str}"), query_str="Hi")
    assert [m.role for m in call_log.calls[0].messages] == [MessageRole.SYSTEM, MessageRole.USER]


def test_text_blocks_are_joined_and_others_refused(
    llm: ProphetKVLLM, completion_engine: ProphetKVEngine, seen: list[Any]
) -> None:
    llm.chat([ChatMessage(blocks=[TextBlock(text="one"), TextBlock(text="two")])])
    assert seen[0][0] == [{"role": "user", "content": "one\ntwo"}]
    image = ChatMessage(blocks=[TextBlock(text="look"), ImageBlock(image=b"x", image_mimetype="image/png")])
    for model in (llm, ProphetKVLLM(engine=completion_engine)):
        with pytest.raises(InputError, match="ImageBlock"):
            model.chat([image])
    with pytest.raises(InputError, match="no chat messages"):
        llm.chat([])


def test_copies_share_the_engine(llm: ProphetKVLLM) -> None:
    for twin in (copy.deepcopy(llm), llm.model_copy(update={"max_new_tokens": 3}), copy.copy(llm)):
        assert twin.engine is llm.engine
        twin.complete("Hi", max_new_tokens=1)
        assert twin.last_report is not None
    assert llm.last_report is None, "a copy's calls are its own"


def test_serialised_form_is_plain_and_reloads(llm: ProphetKVLLM) -> None:
    llm.complete("Hi")
    data = json.loads(llm.to_json())
    assert data["class_name"] == "ProphetKVLLM"
    assert data["max_new_tokens"] == 8
    assert not [name for name in data if "engine" in name or "report" in name]
    again = ProphetKVLLM.from_dict(data, engine=llm.engine)
    assert again.to_dict() == llm.to_dict()
    json.dumps(llm.metadata.model_dump())
    llm._engine = None
    assert llm.to_dict() == again.to_dict()


def test_construction_errors_say_what_to_do(chat_engine: ProphetKVEngine) -> None:
    with pytest.raises(InputError, match="from_pretrained"):
        ProphetKVLLM()
    for wrong in ({"temperature": -1}, {"top_p": 0.0}, {"recompute_ratio": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(ValidationError):
            ProphetKVLLM(engine=chat_engine, **wrong)


def test_from_pretrained_makes_its_own_engine(tmp_path: Any) -> None:
    llm = ProphetKVLLM.from_pretrained(save_tiny(tmp_path / "tiny-model"), max_new_tokens=3)
    assert isinstance(llm, CustomLLM)
    assert llm.model_name == "tiny-model"
    assert llm.complete("Hi").additional_kwargs["completion_tokens"] <= 3


def test_streams_add_up_to_the_whole_answer(llm: ProphetKVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = llm.complete("Tell me about the harbour.", max_new_tokens=20)
    steps = list(llm.stream_complete("Tell me about the harbour.", max_new_tokens=20))
    assert "".join(step.delta for step in steps) == steps[-1].text == whole.text
    assert steps[-1].additional_kwargs == whole.additional_kwargs
    assert steps[-1].raw["finish_reason"] == whole.raw["finish_reason"]
    assert {json.dumps(step.raw["timings_s"]) for step in steps} == {json.dumps(steps[0].raw["timings_s"])}
    made, to_dict = [], ReuseReport.to_dict
    monkeypatch.setattr(ReuseReport, "to_dict", lambda report: made.append(1) or to_dict(report))
    num_steps = len(list(llm.stream_complete("Tell me about the harbour.", max_new_tokens=20)))
    assert num_steps == len(steps)
    assert made == [1, 1], "one dictionary for all steps, and one for the event"
    message = [ChatMessage(content="Tell me about the harbour.")]
    assert list(llm.stream_chat(message, max_new_tokens=20))[-1].message.content == whole.text
