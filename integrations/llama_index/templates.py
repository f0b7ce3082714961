"""The prompt that a LlamaIndex query engine sends, as the engine's settings want to know it."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate
from llama_index.core.prompts.chat_prompts import CHAT_TEXT_QA_PROMPT
from llama_index.core.prompts.default_prompts import DEFAULT_TEXT_QA_PROMPT

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index.messages import Message, to_template_messages
from prophetkv_rag.prompt import probe_chat


def prompt_template_of(tokenizer: Any, template: BasePromptTemplate | None = None) -> str | list[Message]:
    """Return a query engine's prompt for `ProphetKVConfig.prompt_template`.

    Args:
        tokenizer: The model's; with a chat template the prompt is sent as messages, without one as text.
        template: The engine's own template, with `{context_str}`; `None` for LlamaIndex's default.

    Raises:
        InputError: If the template is of another kind, or holds something that is no text.
    """
    is_chat = probe_chat(tokenizer).renders != ""
    if template is None:
        template = CHAT_TEXT_QA_PROMPT if is_chat else DEFAULT_TEXT_QA_PROMPT
    if isinstance(template, ChatPromptTemplate):
        messages = list(template.message_templates)
    elif isinstance(template, PromptTemplate):
        messages = [ChatMessage(role="user", content=template.get_template())]
    else:
        msg = f"a {type(template).__name__} is not supported; give a PromptTemplate or a ChatPromptTemplate"
        raise InputError(msg)
    if is_chat:
        return to_template_messages(messages)
    return template.get_template() if isinstance(template, PromptTemplate) else messages_to_prompt(messages)
