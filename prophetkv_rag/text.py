"""Text as it comes from outside, made Unicode: half characters, bytes in some encoding, names that are no UTF-8.

One rule for all of the package: what is no character becomes U+FFFD, the same way when a chunk is indexed and when a
prompt is read, so that the chunk is still found. Names (of files, from the command line) are shown with their bytes.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Mapping
from typing import Any

from prophetkv_rag.errors import InputError

_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_HALF = re.compile("[\ud800-\udfff]")

# UTF-32's mark begins with UTF-16's, so it is tried first.
_MARKS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def well_formed(text: str) -> str:
    """Return a text that every tokenizer, database and file takes.

    A Python string may hold half of a surrogate pair (from a damaged PDF, or JSON cut off inside an emoji), which no
    encoding can write. Two halves in a row become the character that they are, one alone becomes U+FFFD.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        joined = _PAIR.sub(lambda pair: pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"), text)
        return _HALF.sub("\ufffd", joined)
    return text


def well_formed_parts(value: Any) -> Any:
    """Return `value` with every string in its lists and dictionaries (their keys too) well-formed."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, Mapping):
        return {well_formed_parts(name): well_formed_parts(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [well_formed_parts(part) for part in value]
    return value


def decode_text(content: bytes) -> str:
    """Return a file's text: UTF-8, or what the mark at its start says (UTF-8, UTF-16 or UTF-32).

    Raises:
        InputError: If it is binary, or text in an encoding that nobody can know; the message is the reason alone.
    """
    mark = next((mark for mark in _MARKS if content.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "UTF-8")
    if not mark and b"\0" in content:
        msg = _without_mark(content)
        raise InputError(msg)
    try:
        text = content.decode("utf-8-sig" if encoding == "UTF-8" else encoding)
    except UnicodeDecodeError:
        msg = f"not {encoding} text; save it as UTF-8"
        raise InputError(msg) from None
    if "\0" in text:
        msg = "binary"
        raise InputError(msg)
    return text


def _without_mark(content: bytes) -> str:
    """Tell text in UTF-16 without a mark, where every other byte is zero, from binary."""
    start = content[: 1 << 16]
    least, most = sorted((start[0::2].count(0), start[1::2].count(0)))
    if len(content) >= 8 and len(content) % 2 == 0 and least == 0 and most * 10 >= len(start) * 4:
        return "looks like UTF-16 without a byte order mark; save it as UTF-8"
    return "binary"


def shown_name(name: str | os.PathLike[str]) -> str:
    r"""Return a file's name as text: one that is no UTF-8 with its odd bytes written out, as in `caf\xe9.txt`."""
    text = os.fspath(name)
    return _bytes_of(text).decode("utf-8", "backslashreplace") if _HALF.search(text) else text


def argument_text(argument: str) -> str:
    """Return a command line's argument as text, whatever the locale that it was read by."""
    return _bytes_of(argument).decode("utf-8", "replace") if _HALF.search(argument) else argument


def _bytes_of(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:  # no name of this system's: made by a program
        return well_formed(text).encode()
