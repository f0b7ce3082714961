"""Text to ids and back by a tokenizer of any kind: what it cannot do is done here, around it.

A tokenizer that never turns text into special tokens (mistral-common's) renders chat messages to ids. They become text
again, which is searched for chunks, with each special token between two marks, so that `[INST]` in a user's words stays
text. The marks are code points that Unicode reserves for a program's own use; a message's own are taken out.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.prompt.tokenizer_probe import ChatAbility, encode, probe_chat, probe_tokenizer, rendered_ids
from prophetkv_rag.text import well_formed, well_formed_parts

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


class TextCodec:
    """A tokenizer as the engine uses it. Not locked: a tokenizer's switches are shared by all threads."""

    def __init__(self, tokenizer: Any) -> None:
        """Probe a transformers tokenizer.

        Raises:
            InputError: If it cannot be used.
        """
        self.tokenizer = tokenizer
        # Special-token parsing is a switch on a tokenizer's backend, so chunks get a copy that is never switched back:
        # another thread's call on the shared one cannot turn a chunk's text into control tokens.
        try:
            self._chunk_tokenizer, is_copy = copy.deepcopy(tokenizer), True
        except Exception:  # some hold what cannot be copied
            self._chunk_tokenizer, is_copy = tokenizer, False
        self.abilities = probe_tokenizer(self._chunk_tokenizer)
        self._renders_ids = probe_chat(tokenizer).renders == "ids"
        self._splits = is_copy and self.abilities.splits
        controls = self.abilities.controls
        self._names = {index: token for token, index in controls.items()}
        longest_first = sorted(controls, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @property
    def control_ids(self) -> Collection[int]:
        """Ids of the special tokens, which no text becomes: a chat template puts them around messages."""
        return self._names.keys()

    @property
    def chat(self) -> ChatAbility:
        """How chat messages are rendered; asked anew, since templates are set on a tokenizer at any time."""
        return ChatAbility("ids") if self._renders_ids else probe_chat(self.tokenizer)

    # ---- to ids -----------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text whose special tokens are parsed, as far as the tokenizer does that."""
        return [token for _, ids in self._segments(well_formed(text)) for token in ids]

    def encode_as_text(self, text: str) -> list[int]:
        """Return the ids of a text in which special-token strings stay text."""
        text = well_formed(text)
        if self._splits:
            return encode(self._chunk_tokenizer, text, split_special_tokens=True)
        if not self.abilities.parses:
            return encode(self._chunk_tokenizer, text)
        # Cut behind the first character of each special token, no part has one.
        cuts = [0, *(match.start() + 1 for match in self._specials.finditer(text)), len(text)]
        parts = [text[start:stop] for start, stop in pairwise(cuts)]
        return [token for part in parts if part for token in self._without_controls(part)]

    def _without_controls(self, text: str) -> list[int]:
        """Halve a text until no part becomes a special token (one that is found in another spelling than its own)."""
        ids = encode(self._chunk_tokenizer, text)
        if not any(token in self._names for token in ids):
            return ids
        if len(text) == 1:
            return [token for token in ids if token not in self._names]
        half = len(text) // 2
        return self._without_controls(text[:half]) + self._without_controls(text[half:])

    def _segments(self, text: str) -> Iterable[tuple[str, list[int]]]:
        """Yield a text's parts and their ids: each marked special token by itself, if the text has any."""
        if not self._renders_ids:
            yield text, encode(self.tokenizer, text)
            return
        end = 0
        for match in _MARKED.finditer(text):
            if match[1] in self.abilities.controls:
                if match.start() > end:
                    yield text[end : match.start()], encode(self.tokenizer, text[end : match.start()])
                yield match[0], [self.abilities.controls[match[1]]]
                end = match.end()
        if end < len(text):
            yield text[end:], encode(self.tokenizer, text[end:])

    def rows_of_span(self, text: str, start: int, stop: int) -> list[int]:
        """Return the indices of the tokens of `text`, as `encode` makes them, that overlap `text[start:stop]`.

        Empty where that cannot be told.
        """
        if self.abilities.gives_offsets and not self._renders_ids:
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            return [row for row, (left, right) in enumerate(offsets) if left < stop and right > start and right > left]
        rows: list[int] = []
        at, row = 0, 0
        for part, ids in self._segments(text):
            left, right = max(start - at, 0), min(stop - at, len(part))
            if left < right:
                found = self._rows_within(part, ids, left, right)
                if found is None:
                    return []
                rows += [row + number for number in found]
            at, row = at + len(part), row + len(ids)
        return rows

    def _rows_within(self, text: str, ids: Sequence[int], start: int, stop: int) -> range | None:
        """Find a span's tokens by how long the text is that the first tokens decode to; `None` if they do not."""
        if len(ids) == 1:
            return range(1)

        def length(count: int) -> int:
            return len(self.shown(ids[:count]))

        if self.shown(ids) != text:
            return None
        counts = range(len(ids) + 1)
        first = bisect_right(counts, start, key=length) - 1
        last = bisect_left(counts, stop, key=length)
        return range(first, last)

    # ---- to text ----------------------------------------------------------------------------------------------------

    def check_chat(self) -> None:
        """Raise `InputError` if the tokenizer renders no chat messages."""
        chat = self.chat
        if not chat.renders:
            raise InputError(chat.problem)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
    ) -> str:
        """Render chat messages up to the open assistant turn; `encode` turns the text into the template's ids.

        Args:
            messages: With `role` and `content`, in an arrangement that the template may refuse, by any error.
            tools: Tool descriptions, shown by the template.
            chat_template: Instead of the tokenizer's own; not for one that renders to ids.
        """
        plain = [well_formed_parts(message) for message in messages]
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        if self._renders_ids:
            unmarked = [{name: _unmarked(value) for name, value in message.items()} for message in plain]
            return self._text_of(rendered_ids(self.tokenizer, unmarked, **options), _OPEN, _CLOSE)
        if chat_template is not None:
            options["chat_template"] = chat_template
        return str(self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, **options))

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """As a tokenizer's `decode`; with special tokens it is `shown`."""
        if not skip_special_tokens:
            return self.shown(token_ids)
        return self._decoded(token_ids, skip_special_tokens=True)

    def shown(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special tokens as they are spelt."""
        if self.abilities.shows_specials:
            options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            return self._decoded(token_ids, **options)
        return self._text_of(token_ids)

    def _text_of(self, token_ids: Sequence[int], before: str = "", behind: str = "") -> str:
        """Decode the runs between special tokens one by one."""
        texts = []
        for is_control, run in groupby(token_ids, lambda token: token in self._names):
            if is_control:
                texts += [f"{before}{self._names[token]}{behind}" for token in run]
            elif self.abilities.shows_specials:
                texts.append(self.shown(list(run)))
            else:
                texts.append(self._decoded(run, skip_special_tokens=True))
        return "".join(texts)

    def _decoded(self, token_ids: Iterable[int], **options: Any) -> str:
        """Decode; ids that are no token's stand for nothing (a model's vocabulary may be the longer one)."""
        ids = list(token_ids)
        try:
            return str(self.tokenizer.decode(ids, **options))
        except Exception:  # some tokenizers leave them out by themselves
            known = [token for token in ids if self._is_known(token)]
            if len(known) == len(ids):
                raise
            return str(self.tokenizer.decode(known, **options))

    def _is_known(self, token: int) -> bool:
        try:
            self.tokenizer.decode([token])
        except Exception:
            return False
        return True


def _unmarked(value: Any) -> Any:
    return value.replace(_OPEN, "").replace(_CLOSE, "") if isinstance(value, str) else value
