"""Chat templates in the shapes of the families that people run, written for tests: how each shows and writes calls."""

from __future__ import annotations

from typing import Any

from tests.tiny import tiny_tokenizer

_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
_HEAD = (
    "{% if tools %}<|im_start|>system\n# Tools\n<tools>\n" + _TOOLS + "</tools><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
)
_TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_ARGUMENTS = "{{ c.function.arguments | tojson }}"
_TAGGED = (
    "{% for c in m.tool_calls or [] %}{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": ' + _ARGUMENTS + "}\n</tool_call>{% endfor %}"
)
HERMES = _HEAD + _TAGGED + _TAIL
"""Also Qwen 2.5 and 3."""

THINKING = _HEAD.replace("{{ m.role }}\n", "{{ m.role }}\n{% if m.tool_calls %}<think>\n\n</think>\n\n{% endif %}")
THINKING += _TAGGED + _TAIL
"""A reasoning model that does not reason: an empty thought, then a tag that begins like the thought's."""

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if loop.last and tools %}Given the following functions, please respond with a JSON for a function call.\n\n"
    + _TOOLS
    + "{% endif %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set c = m.tool_calls[0] %}"
    '{"name": "{{ c.function.name }}", "parameters": ' + _ARGUMENTS + "}"
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.last and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}CALLS{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = _MISTRAL.replace(
    "CALLS",
    "[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs must have nine characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": ' + _ARGUMENTS + ', "id": "{{ c.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]",
)
MISTRAL_NAMES = _MISTRAL.replace(
    "CALLS", "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]" + _ARGUMENTS + "{% endfor %}"
)
"""Its newer templates: each call has its own mark, and the name is no JSON."""

FUNCTION_TAGS = _HEAD + (
    "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>" + _ARGUMENTS + "</function>{% endfor %}" + _TAIL
)
"""The name in a tag, as Llama 3.1 writes functions of one's own."""

FAMILIES = {
    "hermes": HERMES,
    "thinking": THINKING,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral names": MISTRAL_NAMES,
    "function tags": FUNCTION_TAGS,
}
_SPECIALS = {
    "llama": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[ARGS]"],
}
_SPECIALS["mistral names"] = _SPECIALS["mistral"]


def family_tokenizer(family: str) -> Any:
    """The tiny tokenizer with a family's template and special tokens; Hermes's tags are tokens, but no special ones."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4096
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIALS.get(family, [])})
    if family in ("hermes", "thinking"):
        tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    if family == "llama":
        tokenizer.eos_token = "<|eot_id|>"
    tokenizer.chat_template = FAMILIES[family]
    return tokenizer
