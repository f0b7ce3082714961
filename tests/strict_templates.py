"""Chat templates that refuse what others take, as those of well-known models do, and the histories they meet."""

from __future__ import annotations

from typing import Any

_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_ALTERNATE = (
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
_FIRST_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% else %}{% set turns = messages %}{% endif %}"
)
_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set turns = messages %}" + _ALTERNATE + _END
)
"""Gemma 2: no system message, user and assistant in turn."""

ALTERNATING = _FIRST_SYSTEM + _ALTERNATE + _END
"""Llama 2: a system message at the head, then user and assistant in turn."""

SYSTEM_FIRST = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% if not asked %}{{ raise_exception('No user query found in messages.') }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    + _TURN
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + _END
)
"""Qwen 3.5: several users in a row, tools, but one system message at the head, and a user."""

NINE_LETTERS = (
    _FIRST_SYSTEM + "{% for m in turns %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}{% endfor %}"
    + _TURN
    + "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    + _END
)
"""Mistral: tool calls, but not those with the ids of another provider."""

ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.tool_calls %}<call>{{ m.tool_calls[0].function | tojson }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + _END
)
"""Llama 3.1: one call a turn, and no words beside it."""

KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}"
    + _TURN
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + _END
)
"""No tools at all."""

STRICT_TEMPLATES = {
    "no_system": NO_SYSTEM,
    "alternating": ALTERNATING,
    "system_first": SYSTEM_FIRST,
    "nine_letters": NINE_LETTERS,
    "one_call": ONE_CALL,
    "known_roles": KNOWN_ROLES,
}


def call(name: str, arguments: Any, id_: str = "call_of_another_model") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


HISTORIES: dict[str, list[dict[str, Any]]] = {
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "When?"}],
    "late_system": [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "In 1862."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "And where?"},
    ],
    "two_users": [{"role": "user", "content": "Context: x"}, {"role": "user", "content": "When?"}],
    "assistant_first": [{"role": "assistant", "content": "Welcome."}, {"role": "user", "content": "When?"}],
    "assistant_only": [{"role": "assistant", "content": "Welcome."}],
    "system_only": [{"role": "system", "content": "Be brief."}],
    "tool": [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [call("look_up", '{"what": "lighthouse"}')]},
        {"role": "tool", "content": "In 1862.", "tool_call_id": "call_of_another_model"},
    ],
    "two_calls": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "When?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [call("look_up", '{"what": "lighthouse"}'), call("look_up", '{"what": "museum"}')],
        },
        {"role": "tool", "content": "In 1862.", "tool_call_id": "call_of_another_model"},
        {"role": "tool", "content": "At ten.", "tool_call_id": "call_of_another_model"},
        {"role": "assistant", "content": "In 1862, at ten."},
        {"role": "user", "content": "Sure?"},
    ],
    "silent_assistant": [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Well?"},
    ],
}


def words_of(messages: list[dict[str, Any]]) -> list[str]:
    """What must be read of a history, whatever the template does with its roles."""
    return [message["content"] for message in messages if message["content"]]
