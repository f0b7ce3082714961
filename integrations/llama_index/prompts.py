"""What a call asks, as the engine takes it: chat messages where the model has a template for them, else text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms.llm import default_completion_to_prompt

from prophetkv_rag.integrations.llama_index.messages import Message, message_text, to_template_messages
from prophetkv_rag.prompt import Prompt

if TYPE_CHECKING:
    from prophetkv_rag.engine import ProphetKVEngine
    from prophetkv_rag.integrations.llama_index.engine_calls import EngineLLM
    from prophetkv_rag.prompt import AnyPrompt


def from_messages(llm: EngineLLM, messages: Sequence[ChatMessage]) -> str | list[Message]:
    """Return template messages, or text where the model or the caller has another format."""
    if llm.engine.has_chat_template and llm.messages_to_prompt is generic_messages_to_prompt:
        return to_template_messages(messages)
    for message in messages:
        message_text(message)  # refuses images, which a text format would silently leave out
    return llm.messages_to_prompt(messages)


def from_text(llm: EngineLLM, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> AnyPrompt:
    """Return the prompt of a completion, as one user message or as it stands; or its parts, where a call gives them."""
    if isinstance(kwargs.get("parts"), Prompt):  # from ProphetKVSynthesizer, which knows where the chunks are
        return kwargs["parts"]
    if formatted:
        return prompt
    if llm.completion_to_prompt is not default_completion_to_prompt:
        return llm.completion_to_prompt(prompt)
    return [{"role": "user", "content": prompt}] if llm.engine.has_chat_template else prompt


def template_tokens(engine: ProphetKVEngine) -> int:
    """Return how many tokens the chat template adds to a system and a user message."""
    if not engine.has_chat_template:
        return 0
    messages = [ChatMessage(role=role, content="x") for role in ("system", "user")]
    tokens = engine.library.tokens
    rendered = tokens.render(to_template_messages(messages))
    return len(tokens.fresh(rendered, first=True)) - len(messages)
