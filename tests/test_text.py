"""Text from outside: half characters, files in some encoding, names that are no UTF-8."""

from __future__ import annotations

import os
import sys

import pytest

from prophetkv_rag.errors import InputError
from prophetkv_rag.text import argument_text, decode_text, shown_name, well_formed, well_formed_parts

TEXT = "Grüße aus 東京 😀\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        (TEXT, TEXT),
        ("a\ud835b", "a\ufffdb"),
        ("\udc00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ude00!", "😀!"),  # two halves that a parser gave one by one
        ("\ud83d\ud83d\ude00", "\ufffd😀"),
    ],
)
def test_halves_are_joined_or_replaced(text: str, expected: str) -> None:
    assert well_formed(text) == expected
    assert well_formed(expected) == expected


def test_strings_within_are_made_well_formed_and_the_rest_is_left_alone() -> None:
    tensor = object()
    value = {"k\ud800": ["\ud800", 1, None, (2.5, "x")], "t": tensor}
    assert well_formed_parts(value) == {"k\ufffd": ["\ufffd", 1, None, [2.5, "x"]], "t": tensor}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_says_the_encoding(encoding: str) -> None:
    assert decode_text(TEXT.encode(encoding)) == TEXT


@pytest.mark.parametrize(
    ("mark", "encoding"), [(b"\xfe\xff", "utf-16-be"), (b"\xff\xfe", "utf-16-le"), (b"\0\0\xfe\xff", "utf-32-be")]
)
def test_both_byte_orders(mark: bytes, encoding: str) -> None:
    assert decode_text(mark + TEXT.encode(encoding)) == TEXT


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("Grüße".encode("latin-1"), "not UTF-8 text; save it as UTF-8"),
        (b"\xff\xfea", "not UTF-16 text"),
        (b"\xff\xfe\x00\xd8x\x00", "not UTF-16 text"),  # half of a pair
        ("Some words.".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("Some words.".encode("utf-16-be"), "UTF-16 without a byte order mark"),
        (b"a\0b", "binary"),
        (b"\x7fELF\0\0\0\1\2\3", "binary"),
        (b"\xff\xfea\0\0\0", "binary"),
    ],
)
def test_what_cannot_be_read_is_named(content: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        decode_text(content)


def test_names_and_arguments_of_odd_bytes() -> None:
    assert shown_name("日本.txt") == argument_text("日本.txt") == "日本.txt"
    if sys.getfilesystemencoding() == "utf-8" and os.name == "posix":
        assert shown_name(os.fsdecode(b"caf\xe9.txt")) == r"caf\xe9.txt"
        assert argument_text(os.fsdecode(b"caf\xe9?")) == "caf\ufffd?"
    assert shown_name("a\ud835").isprintable()
    argument_text("a\ud835").encode()
