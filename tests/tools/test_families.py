"""Tools by the templates that people run: what a template writes is read, and only what it would write is said."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from prophetkv_rag import InputError, ProphetKVEngine
from prophetkv_rag.generation import StreamChunk
from prophetkv_rag.tools import ToolRun, find_tool_format
from tests.tiny import tiny_llama
from tests.tools.families import FAMILIES, HERMES, family_tokenizer

ASKED = [{"role": "user", "content": "Hello."}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["city"],
}
SCHEMAS: dict[str, Any] = {"get_weather": WEATHER, "stop": {"type": "object", "properties": {}}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop"}},
]
CALLS = [("get_weather", {"city": "Rome", "days": 3}), ("stop", {})]
LETTERS = [{"type": "function", "function": {"name": "send", "parameters": {"properties": {"text": {}}}}}]


@cache
def engine_of(family: str) -> ProphetKVEngine:
    tokenizer = family_tokenizer(family)
    return ProphetKVEngine(tiny_llama(vocab_size=len(tokenizer), initializer_range=0.1), tokenizer)


def run_of(family: str, choice: Any = None, tools: Any = TOOLS, **more: Any) -> ToolRun:
    engine = engine_of(family)
    return ToolRun(engine.tokens, engine.chunk_index, ASKED, tools, choice, **more)


def answer_ids(family: str, calls: list[tuple[str, dict[str, Any]]], words: str = "") -> list[int]:
    """The tokens of an assistant's turn with these calls, as the family's template writes it in a history."""
    tokenizer = engine_of(family).tokenizer
    written = [
        {"type": "function", "id": f"callno{number:03d}", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]

    def rendered(message: dict[str, Any]) -> str:
        text = tokenizer.apply_chat_template([*ASKED, message], tools=TOOLS, tokenize=False)
        return str(text)

    said = rendered({"role": "assistant", "content": "words"})
    before, _, end = said.rpartition("words")
    turn = rendered({"role": "assistant", "content": words, "tool_calls": written})[len(before) :].removesuffix(end)
    for number in range(len(calls)):  # the program's own, which no model writes
        turn = turn.replace(f', "id": "callno{number:03d}"', "")
    return list(tokenizer(turn, add_special_tokens=False)["input_ids"])


def takes(family: str, run: ToolRun, token_ids: list[int]) -> bool:
    """Whether the run's grammar lets an answer be these tokens, and end there."""
    constraint = engine_of(family)._grammars.start(run.settings["grammar"])
    for token in token_ids:
        if constraint.is_complete:
            break  # the answer ends by itself, before what closes a call
        if not torch.isfinite(constraint.masked(torch.zeros(1, len(engine_of(family).tokenizer)))[0, token]):
            return False
        constraint.take(token)
    return constraint.may_end


def read(family: str, run: ToolRun, token_ids: list[int], reason: str = "stop") -> list[str]:
    """The words that a stream of these tokens shows, piece by piece; the run has the calls."""
    tokens, report = engine_of(family).tokens, engine_of(family).generate("x", max_new_tokens=1).report
    shown, had = [], ""
    for size in range(1, len(token_ids) + 2):
        text = tokens.decode(token_ids[:size]).rstrip("\ufffd")
        last = reason if size > len(token_ids) else None
        piece = StreamChunk(text[len(had) :], text, tuple(token_ids[:size]), last, report)  # type: ignore[arg-type]
        had = text
        shown.append(run.add(piece).text)
    return shown


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("hermes", ("", "<tool_call>", '\n{"name": "', '", "arguments": ', '}\n</tool_call>\n<tool_call>\n{"name": "')),
        ("thinking", ("<think>\n\n</think>\n\n", "<tool_call>", '\n{"name": "', '", "arguments": ', None)),
        ("llama", ("", "", '{"name": "', '", "parameters": ', None)),
        ("mistral", ("", "[TOOL_CALLS]", '[{"name": "', '", "arguments": ', '}, {"name": "')),
        ("mistral names", ("", "[TOOL_CALLS]", "", "[ARGS]", "[TOOL_CALLS]")),
        ("function tags", ("", "<function=", "", ">", "</function><function=")),
    ],
)
def test_how_calls_are_written_is_found_by_rendering(family: str, expected: tuple[Any, ...]) -> None:
    found = find_tool_format(family_tokenizer(family))
    between = found.between if expected[4] is not None or family == "llama" else None
    assert (found.opening, found.marker, found.lead, found.before_arguments, between) == expected


ROWS = {
    "Hermes, Qwen 2.5 and 3": "hermes",
    "Llama 3.x": "llama",
    "Mistral": "mistral",
    "Mistral since 2025": "mistral names",
    "functions in tags": "function tags",
}


def test_the_table_of_families_is_what_is_found() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "server.md").read_text("utf-8")
    table = page.partition("| family |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    assert [row[0] for row in cells] == list(ROWS)
    for name, begins, several in cells:
        found = find_tool_format(family_tokenizer(ROWS[name]))
        assert begins == f"`{found.marker}{found.lead}`".replace("\n", "\\n")
        assert several == ("no" if found.between is None else "yes")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_template_writes_may_be_said_and_is_read(family: str) -> None:
    for calls in (CALLS[:1], CALLS[1:], CALLS):
        if family == "llama" and len(calls) > 1:
            continue  # its template writes one call
        token_ids = answer_ids(family, calls)
        for choice in (None, "any"):
            run = run_of(family, choice)
            assert takes(family, run, token_ids), engine_of(family).tokens.shown(token_ids)
            is_thought = family == "thinking" and choice is None
            assert "".join(read(family, run, token_ids)) == ("<think>\n\n</think>" if is_thought else "")
            assert [(call.name, call.values) for call in run.calls] == calls
            assert len({call.id for call in run.calls}) == len(calls)
            assert all(len(call.id) == 9 and call.id.isalnum() for call in run.calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_what_the_tools_say(family: str) -> None:
    """A random model, which knows nothing of tools."""
    engine, names = engine_of(family), set()
    for seed, choice in enumerate(("any", "any", "any", "get_weather", "get_weather", "stop")):
        run = run_of(family, choice, parallel=False)
        for piece in engine.stream(run.prompt, temperature=1.5, seed=seed, max_new_tokens=120, **run.settings):
            run.add(piece)
        assert run.finish_reason(piece) == "tool_calls"
        (call,) = run.calls
        jsonschema.validate(call.values, SCHEMAS[call.name])
        assert choice in ("any", call.name)
        names.add(call.name)
    assert names == set(SCHEMAS)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_calls_cannot_be_said(family: str) -> None:
    for call in (("get_weather", {"city": "Paris"}), ("get_wether", {"city": "Rome"}), ("stop", {"a": 1})):
        token_ids = answer_ids(family, [call])
        assert not takes(family, run_of(family), token_ids)
        assert not takes(family, run_of(family, "any"), token_ids)
    assert not takes(family, run_of(family, "stop"), answer_ids(family, CALLS[:1]))
    words = engine_of(family).tokenizer("Hello {} <", add_special_tokens=False)["input_ids"]
    assert takes(family, run_of(family), words)
    assert not takes(family, run_of(family, "any"), words)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_adds_up_and_shows_no_piece_of_a_call(family: str) -> None:
    text = 'x } [{"a": "é\n'
    before = "" if family in ("llama", "mistral") else "I look < here."
    token_ids = answer_ids(family, [("send", {"text": text})], before)
    run, report = run_of(family, tools=LETTERS), engine_of(family).generate("x", max_new_tokens=1).report
    arguments, words, heads, tokens = "", "", [], engine_of(family).tokens
    for size in range(1, len(token_ids) + 2):
        shown = tokens.decode(token_ids[:size]).rstrip("\ufffd")
        reason: Any = "stop" if size > len(token_ids) else None
        piece = run.add(StreamChunk("", shown, tuple(token_ids[:size]), reason, report))
        words += piece.text
        for delta in piece.calls:
            heads.append((delta.name, delta.id))
            arguments += delta.arguments
    assert heads == [("send", run.calls[0].id)] + [(None, None)] * (len(heads) - 1)
    assert len(heads) > 4
    assert json.loads(arguments) == {"text": text} == run.calls[0].values
    assert "tool" not in words
    assert "{" not in words


def test_thoughts_stay_possible() -> None:
    """Tags of a thought are tokens by themselves, which a grammar has to name."""
    tokenizer = engine_of("thinking").tokenizer
    thought = tokenizer("<think>\nSo.\n</think>\n\nWords.", add_special_tokens=False)["input_ids"]
    assert takes("thinking", run_of("thinking"), thought)
    assert takes("thinking", run_of("thinking"), [*thought, *answer_ids("hermes", CALLS[:1])])


def test_a_prompt_that_opens_a_thought_has_it_ended_before_a_forced_call() -> None:
    tokenizer = family_tokenizer("hermes")
    tokenizer.chat_template = HERMES.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert find_tool_format(tokenizer).opening == "</think>\n\n"


def test_what_small_models_write() -> None:
    tokenizer = engine_of("hermes").tokenizer

    def names(text: str, **more: Any) -> list[str]:
        run = run_of("hermes", **more)
        read("hermes", run, tokenizer(text, add_special_tokens=False)["input_ids"])
        return [call.name for call in run.calls]

    assert names('{"name": "stop", "arguments": {}}') == ["stop"], "the marker was forgotten"
    assert names('```json\n{"name": "stop", "arguments": {}}\n```') == ["stop"], "a fence was put around it"
    assert names('{"name": "unknown", "arguments": {}}') == [], "an answer in JSON is no call"
    twice = '{"name": "stop", "arguments": {}}\n' * 2
    assert names(twice) == ["stop", "stop"]
    assert names(twice, parallel=False) == ["stop"], "one call was to be made"
    assert names('See {"name": "stop", "arguments": {}}') == [], "an example in an answer is no call"
    run = run_of("hermes")
    read(
        "hermes", run, tokenizer('{"name": "stop", "arguments": "{\\"a\\": 1}"}', add_special_tokens=False)["input_ids"]
    )
    assert run.calls[0].values == {"a": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_is_cut_off_says_so(family: str) -> None:
    engine = engine_of(family)
    for most in (1, 5, 12, 16):
        run = run_of(family, "get_weather")
        for piece in engine.stream(run.prompt, max_new_tokens=most, **run.settings):
            run.add(piece)
        is_whole = bool(run.calls) and run.calls[0].is_whole
        assert run.finish_reason(piece) == ("tool_calls" if piece.finish_reason == "stop" else "length")
        assert is_whole or piece.finish_reason == "length"
        assert all(call.values is None for call in run.calls if not call.is_whole)


def test_words_come_at_once() -> None:
    run = run_of("hermes")
    token_ids = engine_of("hermes").tokenizer("The library opens at nine.", add_special_tokens=False)["input_ids"]
    pieces = read("hermes", run, token_ids)
    assert "".join(pieces) == "The library opens at nine."
    assert sum(map(bool, pieces)) > 3
    texts = ["".join(pieces[:size]) for size in range(len(pieces))]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_an_answer_with_a_schema_or_a_call() -> None:
    answer = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    run = run_of("hermes", answer=answer)
    tokenizer = engine_of("hermes").tokenizer
    assert takes("hermes", run, answer_ids("hermes", CALLS[:1]))
    assert takes("hermes", run, tokenizer('{"a": 1}', add_special_tokens=False)["input_ids"])
    assert not takes("hermes", run, tokenizer("Words.", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("{{ c.function.arguments | tojson }} for {{ c.function.name }}", "arguments before its name"),
        ("<function={{ c.function.name }}><parameter=a>1</parameter></function>", "not JSON"),
    ],
)
def test_forms_that_cannot_be_read(call: str, says: str) -> None:
    tokenizer = family_tokenizer("hermes")
    loop = "{% for c in m.tool_calls or [] %}" + call + "{% endfor %}"
    tokenizer.chat_template = (
        HERMES.partition("{% for c in")[0] + loop + HERMES.rpartition("</tool_call>{% endfor %}")[2]
    )
    with pytest.raises(InputError, match=says):
        find_tool_format(tokenizer)


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        ("f", None, "must be a list"),
        ([{"type": "function"}], None, "tool 0 is no function"),
        ([{"type": "custom", "custom": {"name": "f"}}], None, "tool 0 is no function"),
        ([{"type": "function", "function": {"description": "x"}}], None, "tool 0 has the name None"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "tool 0 has the name 'a b'"),
        ([{"type": "function", "function": {"name": "f", "parameters": "x"}}], None, "parameters of the tool 'f'"),
        (TOOLS, "get_wether", "allowed: get_weather, stop, any, auto, none"),
        (TOOLS, {"type": "function", "function": {"name": "x"}}, "tool_choice is 'x'"),
        (TOOLS, {"type": "function"}, "tool_choice is 'function'"),
        (TOOLS, 3, "tool_choice is 3"),
    ],
)
def test_bad_tools(tools: Any, choice: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        run_of("hermes", choice, tools)
