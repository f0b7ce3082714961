"""Text to token ids, the same way at index time and at query time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from prophetkv_rag.config import PLACEHOLDER, ProphetKVConfig
from prophetkv_rag.errors import InputError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.prompt.chat_messages import plain_messages
from prophetkv_rag.prompt.chat_template import render_messages
from prophetkv_rag.prompt.codec import TextCodec
from prophetkv_rag.prompt.prompt import Message, TextOrIds
from prophetkv_rag.prompt.tokenizer_probe import start_ids

logger = logging.getLogger(__name__)

_SENTINEL = "\u2063prophetkv\u2063"
# Put in front of a chat template, this macro hides the function that templates print today's date with.
_FIXED_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class Tokens:
    """The engine's view of a tokenizer; works without one as long as everything is given as token ids."""

    def __init__(self, tokenizer: Any) -> None:
        """Wrap a transformers tokenizer, or `None`.

        Raises:
            InputError: If it cannot be used.
        """
        self.tokenizer = tokenizer
        self.codec = None if tokenizer is None else TextCodec(tokenizer)
        self._lock = threading.Lock()
        around_fork(self, "_lock")
        self._start: list[int] | None = None

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return self.codec is not None and self.codec.chat.renders != ""

    def marks(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the positions of control tokens, such as a chat template puts around messages."""
        controls = () if self.codec is None else self.codec.control_ids
        return tuple(position for position, token in enumerate(token_ids) if token in controls)

    def _require(self, what: str) -> TextCodec:
        if self.codec is None:
            msg = f"{what} was given as text, but the engine has no tokenizer; give token ids, or make it with one"
            raise InputError(msg)
        return self.codec

    def fresh(self, part: TextOrIds, *, first: bool = False) -> list[int]:
        """Tokenise what stands outside chunks; special tokens in it (a chat template's) are parsed.

        `first` marks the start of the prompt: it gets the tokenizer's BOS unless it begins with it.
        """
        if not isinstance(part, str):
            return [int(token) for token in part]
        if not part and not first:
            return []
        codec = self._require("a part of the prompt")
        with self._lock:
            ids = codec.encode(part) if part else []
            if first:
                start = self._start_ids()
                if start and ids[: len(start)] != start:
                    ids = [*start, *ids]
        return ids

    def _start_ids(self) -> list[int]:
        """Return what the tokenizer itself puts in front of a text, asked once: BOS, or nothing."""
        if self._start is None:
            self._start = start_ids(self.tokenizer)
        return self._start

    def chunk(self, text: str) -> list[int]:
        """Tokenise a chunk; special-token strings in it stay text."""
        codec = self._require("a chunk")
        with self._lock:
            return codec.encode_as_text(text)

    def rows_of_span(self, text: str, start: int, stop: int) -> list[int]:
        """Return the indices of the tokens of `text` (tokenised as fresh text) that overlap `text[start:stop]`.

        Empty where the tokenizer cannot tell; the whole suffix then asks.
        """
        codec = self._require("the question")
        with self._lock:
            return codec.rows_of_span(text, start, stop)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
    ) -> str:
        """Render chat messages with the model's own template, up to the open assistant turn.

        Raises:
            InputError: If there are no messages, no template, or the template takes them in no arrangement.
        """
        plain = plain_messages(messages)
        codec = self._require("a chat")
        codec.check_chat()
        return render_messages(partial(codec.render, tools=tools, chat_template=chat_template), plain)

    def encoding_prefix(self, config: ProphetKVConfig, *, max_lead_in_tokens: int) -> tuple[int, ...]:
        """Return the token ids that chunks are encoded behind; see `ProphetKVConfig`.

        Args:
            config: Says what they are. Without a tokenizer only an `encoding_prefix` of token ids counts.
            max_lead_in_tokens: Of the lead-in, only this many tokens from its start are used; special-token strings in
                it stay text.
        """
        if config.encoding_prefix is not None:
            return tuple(self.fresh(config.encoding_prefix, first=True))
        if self.tokenizer is None:
            return ()
        template = config.prompt_template
        opening = self.default_encoding_prefix() if template is None else self._opening(template)
        lead_in_ids = self.chunk(config.lead_in)[:max_lead_in_tokens] if config.lead_in else []
        return (*opening, *lead_in_ids)

    def default_encoding_prefix(self) -> tuple[int, ...]:
        """Return what chunks are encoded behind by default: BOS and the chat template's opening of a user message.

        Of a template that rejects a lone user message it is BOS alone.
        """
        if self.tokenizer is None:
            return ()
        if self.has_chat_template or getattr(self.tokenizer, "chat_template", None):
            try:
                return self._opening([{"role": "user", "content": "{context}"}])
            except ValueError as error:  # of several templates with no default, too
                logger.warning("chunks are encoded behind no chat template's opening: %s", error)
        return tuple(self.fresh("", first=True))

    def _opening(self, prompt_template: str | Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the token ids that an application's prompts have before the first chunk."""
        if isinstance(prompt_template, str):
            return tuple(self.fresh(PLACEHOLDER.split(prompt_template)[0], first=True))
        marked = [
            dict(message) | {"content": PLACEHOLDER.sub(_SENTINEL, message["content"])} for message in prompt_template
        ]
        # Some chat templates print today's date; a prefix that changes every night would lose every cache.
        is_text = self._require("a chat").chat.renders == "text"
        template = _FIXED_DAY + self.tokenizer.get_chat_template() if is_text else None
        opening, found, _ = self.render(marked, chat_template=template).partition(_SENTINEL)
        return tuple(self.fresh(opening if found else "", first=True))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of generated tokens, without special tokens."""
        return self._require("the answer").decode(token_ids, skip_special_tokens=True)

    def shown(self, token_ids: Sequence[int]) -> str:
        """Return the text of generated tokens, special tokens as they are spelt."""
        return self._require("the answer").shown(token_ids)
