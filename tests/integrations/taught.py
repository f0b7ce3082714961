"""A tiny model that has been taught to call tools: a few lessons learned by heart, so that tests need no luck.

Everything is real: it is trained here for some seconds, and answers by its own greedy decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from pydantic import BaseModel

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.engine import ProphetKVEngine
from tests.tiny import tiny_llama, tiny_tokenizer

TOOL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and tools %}<|im_start|>system\nTools:"
    "{% for tool in tools %} {{ tool.function.name }}({{ tool.function.parameters.properties | join(', ') }})"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Shows tools and writes calls in a widespread form, but shorter: names and parameters only."""

SAN_FRANCISCO = [{"role": "user", "content": "What is the weather in San Francisco, CA?"}]
HELLO = [{"role": "user", "content": "Hello!"}]

CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'


class Joke(BaseModel):
    setup: str
    punchline: str


@dataclass(frozen=True)
class Lesson:
    """A question, the tools at hand, what to say, a tool's name if one is chosen for the model, and who it is."""

    question: str
    tools: dict[str, tuple[str, ...]]
    answer: str
    chosen: str = ""
    system: str = ""


CATS = "Tell me a joke about cats."
JOKE = '{"setup": "Cat?", "punchline": "Mat."}'
JOKE_KEYS = ("setup", "punchline")
WEATHER = {"get_weather": ("location",)}
TWO = {"magic_function": ("input",), **WEATHER}
CUSTOMER = {"unicode_customer": ("customer_name", "description")}
TOWN_QUESTION = "When does the museum open, and when the library?"
LESSONS = (
    Lesson(
        "What is the value of magic_function(3)? Use the tool.",
        {"magic_function": ("input",)},
        CALL % ("magic_function", '{"input": 3}'),
    ),
    Lesson(
        "What is the value of magic_function_no_args()? Use the tool.",
        {"magic_function_no_args": ()},
        CALL % ("magic_function_no_args", "{}"),
    ),
    Lesson(
        "Using the tool, generate a Pirate greeting.",
        {"greeting_generator": ("answer_style",)},
        CALL % ("greeting_generator", '{"answer_style": "Pirate"}'),
    ),
    Lesson("Hello!", TWO, CALL % ("get_weather", '{"location": "here"}')),
    Lesson("Hello!", TWO, CALL % ("magic_function", '{"input": 3}'), chosen="magic_function"),
    Lesson(CATS, {"Joke": JOKE_KEYS}, CALL % ("Joke", JOKE)),
    Lesson(CATS, {"JokeDict": JOKE_KEYS}, CALL % ("JokeDict", JOKE)),
    Lesson(CATS, {}, JOKE),
    Lesson(
        f"{CATS} Return the result as a JSON with 'setup' and 'punchline' keys. Return nothing other than JSON.",
        {},
        JOKE,
    ),
    Lesson(
        "Give me the setup to a joke about cats, no punchline.",
        {"Joke": JOKE_KEYS},
        CALL % ("Joke", '{"setup": "Cat?"}'),
    ),
    Lesson("Give me the setup to a joke about cats, no punchline.", {}, '{"setup": "Cat?"}'),
    Lesson("Give me a joke about cats, include the punchline.", {"Joke": JOKE_KEYS}, CALL % ("Joke", JOKE)),
    Lesson("Give me a joke about cats, include the punchline.", {}, JOKE),
    Lesson("What is the weather in San Francisco, CA?", WEATHER, CALL % ("get_weather", '{"location": "SF"}')),
    Lesson(
        "Create a customer named '你好啊集团' (Hello Group) - a Chinese technology company",
        CUSTOMER,
        CALL % ("unicode_customer", '{"customer_name": "你", "description": "x"}'),
    ),
    Lesson(
        "Create a customer named 'こんにちは株式会社' (Hello Corporation) - a Japanese company",
        CUSTOMER,
        CALL % ("unicode_customer", '{"customer_name": "こ", "description": "x"}'),
    ),
    Lesson(TOWN_QUESTION, {"search_town": ("query",)}, "I look.\n" + CALL % ("search_town", '{"query": "museum"}')),
)


def tool_tokenizer() -> Any:
    """The tiny tokenizer with a chat template that shows tools."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4096
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def _parameters(keys: tuple[str, ...]) -> dict[str, Any]:
    return {"properties": {key: {"type": "string"} for key in keys}, "required": list(keys)}


def as_tools(tools: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Tool descriptions in OpenAI's form."""
    return [
        {
            "type": "function",
            "function": {"name": name, "parameters": _parameters(keys)},
        }
        for name, keys in tools.items()
    ]


MOST_STEPS, ENOUGH = 400, 0.05  # steps, mean loss: no answer hangs on a rounding error then


def _lesson_ids(engine: ProphetKVEngine, lesson: Lesson) -> tuple[list[int], list[int]]:
    """Return a lesson's tokens, and what is to be learned of them: -100 for what is given."""
    system = [{"role": "system", "content": lesson.system}] if lesson.system else []
    asked = [*system, {"role": "user", "content": lesson.question}]
    prompt = engine.tokens.render(asked, tools=as_tools(lesson.tools))
    given = engine.read(prompt).input_ids.tolist()
    said = [*engine.tokenizer(lesson.answer)["input_ids"], engine.tokenizer.eos_token_id]
    start = len(engine.tokenizer(lesson.answer.partition('"arguments"')[0])["input_ids"]) if lesson.chosen else 0
    return [*given, *said], [-100] * (len(given) + start) + said[start:]


@cache
def taught_engine(**shape: int) -> ProphetKVEngine:
    """An engine on a tiny model that knows the lessons; `shape` goes to its configuration."""
    return teach(LESSONS, **shape)


def teach(lessons: Sequence[Lesson], **shape: int) -> ProphetKVEngine:
    """Return an engine on a tiny model that knows these lessons by heart."""
    model, tokenizer = tiny_llama(num_hidden_layers=2, max_position_embeddings=4096, **shape), tool_tokenizer()
    engine = ProphetKVEngine(model, tokenizer)
    sequences, labels = [], []
    for lesson in lessons:
        sequence, label = _lesson_ids(engine, lesson)
        sequences.append(torch.tensor(sequence))
        labels.append(torch.tensor(label))
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=2)
    wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(MOST_STEPS):
        output = model(input_ids=ids, labels=wanted)
        said = output.logits[:, :-1].argmax(-1)
        if output.loss < ENOUGH and bool(((said == wanted[:, 1:]) | (wanted[:, 1:] < 0)).all()):
            break
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    else:
        msg = f"the lessons were not learned: loss {output.loss:.3f}"
        raise AssertionError(msg)
    model.requires_grad_(requires_grad=False)
    config = ProphetKVConfig(query_scope="question", recompute_ratio=1.0)
    return ProphetKVEngine(model, tokenizer, config=config)  # its identity is that of the weights as they are now
