"""What a tokenizer can do, found out once by asking it, as the model is probed: no class or model is known by name.

What is missing is worked around (`codec.py`), or refused here, when the engine is made, rather than at the first chunk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prophetkv_rag.errors import InputError

_TEXT = "A word,\n and 12 more."
_ASKED = [{"role": "user", "content": "Hello."}]


@dataclass(frozen=True, slots=True)
class ChatAbility:
    """How a tokenizer renders chat messages: to `"text"`, by its chat template, to `"ids"` alone, or not.

    `problem` says why not, and what to do.
    """

    renders: Literal["text", "ids", ""]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class TokenizerAbilities:
    """What a tokenizer can do.

    Attributes:
        controls: Special-token strings and their ids, without the unknown token.
        parses: Whether a text that holds such a string gets its id.
        splits: Whether `split_special_tokens=True` leaves them text.
        gives_offsets: Whether `return_offsets_mapping=True` says where each token stands.
        shows_specials: Whether `decode` with special tokens gives text back (some give pieces of their vocabulary).
    """

    controls: Mapping[str, int]
    parses: bool
    splits: bool
    gives_offsets: bool
    shows_specials: bool


def probe_tokenizer(tokenizer: Any) -> TokenizerAbilities:
    """Ask a tokenizer what it can do.

    Args:
        tokenizer: One that nobody else uses: asking may leave switches of its own set.

    Raises:
        InputError: If it cannot turn text into token ids, or them into text.
    """
    try:
        ids = encode(tokenizer, _TEXT)
        tokenizer.decode(ids, skip_special_tokens=True)
    except Exception as error:  # whatever a foreign object makes of the call
        msg = (
            f"a {type(tokenizer).__name__} cannot be used as the tokenizer: turning a text into token ids and back "
            f"failed ({type(error).__name__}: {error}); give the model's own: AutoTokenizer.from_pretrained(...)"
        )
        raise InputError(msg) from error
    controls = _controls(tokenizer)
    joined = "a".join(["", *controls, ""])
    has_controls = set(controls.values()).intersection
    as_text = _tried(tokenizer, joined, split_special_tokens=True)
    offsets = _tried(tokenizer, _TEXT, "offset_mapping", return_offsets_mapping=True)
    return TokenizerAbilities(
        controls=controls,
        parses=bool(has_controls(encode(tokenizer, joined))),
        splits=as_text is not None and not has_controls(as_text),
        gives_offsets=_are_offsets(offsets, len(ids)),
        shows_specials=_shows(tokenizer, ids, controls),
    )


def probe_chat(tokenizer: Any) -> ChatAbility:
    """Ask a tokenizer whether, and how, it renders chat messages; a template that refuses some is one all the same."""
    if getattr(tokenizer, "chat_template", None):
        try:
            tokenizer.get_chat_template()
        except ValueError:
            template = tokenizer.chat_template
            names = f" ({', '.join(map(str, template))})" if isinstance(template, Mapping) else ""
            msg = f"the tokenizer has several chat templates{names} and no default; set tokenizer.chat_template to one"
            return ChatAbility("", msg)
        return ChatAbility("text")
    try:
        if rendered_ids(tokenizer, _ASKED):
            return ChatAbility("ids")
    except Exception:  # transformers' own for a tokenizer without a template, or anything at all
        pass
    return ChatAbility(
        "", "the tokenizer has no chat template; give the prompt as one string, or set tokenizer.chat_template"
    )


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Return the ids of a text without BOS."""
    return [int(token) for token in tokenizer(text, add_special_tokens=False, **options)["input_ids"]]


def rendered_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """Return the ids of chat messages, up to the open assistant turn."""
    plain = [dict(message) for message in messages]
    options |= {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
    return list(tokenizer.apply_chat_template(plain, **options))


def start_ids(tokenizer: Any) -> list[int]:
    """Return what a tokenizer itself puts in front of a text: BOS, or nothing."""
    bos = getattr(tokenizer, "bos_token_id", None)
    for text in ("", _TEXT):  # some refuse an empty text
        try:
            ids = [int(token) for token in tokenizer(text)["input_ids"]]
        except Exception:
            continue
        return [bos] if bos is not None and ids[:1] == [bos] else []
    return []


def _controls(tokenizer: Any) -> dict[str, int]:
    try:
        added = tokenizer.added_tokens_decoder  # a method that raises, of mistral-common's
    except Exception:
        added = None
    found = {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
    if isinstance(added, Mapping):
        found |= {str(token) for token in added.values() if getattr(token, "special", False)}
    unknown = getattr(tokenizer, "unk_token_id", None)  # what any odd character may become
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in sorted(found) if token}
    return {token: index for token, index in ids.items() if isinstance(index, int) and index != unknown}


def _tried(tokenizer: Any, text: str, what: str = "input_ids", **options: Any) -> Any:
    """Return an answer, or `None` of a tokenizer that refuses the question."""
    try:
        return list(tokenizer(text, add_special_tokens=False, **options)[what])
    except Exception:  # ValueError, TypeError, NotImplementedError, KeyError ...
        return None


def _are_offsets(offsets: Any, length: int) -> bool:
    try:
        spans = [_TEXT[start:stop] for start, stop in offsets]
    except (TypeError, ValueError):
        return False
    return len(spans) == length and re.sub(r"\s", "", "".join(spans)) == re.sub(r"\s", "", _TEXT)


def _shows(tokenizer: Any, ids: Sequence[int], controls: Mapping[str, int]) -> bool:
    spelt, special = next(iter(controls.items()), ("", None))
    every = [*ids, *([] if special is None else [special])]
    try:
        text = tokenizer.decode(every, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    except Exception:
        return False
    return re.sub(r"\s*", "", str(text)) == re.sub(r"\s*", "", _TEXT + spelt) and _TEXT in str(text)
