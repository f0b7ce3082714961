"""The report as HTML: escaped, self-contained, and saying in text what it says in colour."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from prophetkv_rag import Prompt, ProphetKVEngine
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

EVIL = "</pre><script>alert('x')</script><img src=x onerror=\"alert(1)\"> & <iframe> "
CHUNKS = [EVIL + text_of(60, seed=1), "日本語 👩‍👩‍👧 " + text_of(60, seed=2)]
PROMPT = Prompt("Read: ", CHUNKS, "What?")


class Reader(HTMLParser):
    """Collects the text of every segment, the number of underlined tokens, and all tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.segments: list[str] = []
        self.underlined = 0
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self.inside = True
            self.segments.append("")
        if self.inside and "r" in (dict(attrs).get("class") or "").split():
            self.underlined += 1

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.segments[-1] += data


@pytest.fixture(scope="module")
def engine() -> ProphetKVEngine:
    engine = ProphetKVEngine(tiny_llama(initializer_range=0.3), tiny_tokenizer())
    engine.add_chunks(CHUNKS[:1])
    return engine


def test_untrusted_text_stays_text(engine: ProphetKVEngine) -> None:
    html = engine.prefill(PROMPT).report.to_html(title="<i>Who</i>?", answer="<script>1</script>")
    reader = Reader(html)
    assert reader.segments == [PROMPT.prefix, *CHUNKS, PROMPT.suffix]
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "img", "iframe", "link"})
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert "<i>Who" not in html
    assert "&lt;i&gt;Who&lt;/i&gt;?" in html
    assert "http" not in html  # nothing is fetched


def test_a_token_alone_is_escaped_too(engine: ProphetKVEngine) -> None:
    """Every token has an element of its own here, and "<" alone would pass for text in a parser."""
    html = engine.prefill(PROMPT, recompute_ratio=1.0).report.to_html()
    known = "html|head|meta|title|style|body|main|div|h1|h2|p|b|i|ul|li|span|section|header|code|pre"
    assert re.findall(rf"<(?!/?(?:{known})\b|!doctype html>)", html) == []


def test_every_recomputed_token_is_underlined(engine: ProphetKVEngine) -> None:
    result = engine.prefill(Prompt("Read: ", [CHUNKS[0]], "What?"))  # no character of several tokens
    assert Reader(result.report.to_html()).underlined == result.report.recomputed_tokens > 0


def test_what_happened_is_said_in_words(engine: ProphetKVEngine) -> None:
    html = engine.prefill(PROMPT).report.to_html()
    for words in ("from cache", "was not cached", "stage I: scoring", "recomputed, score"):
        assert words in html
    full = engine.prefill(PROMPT, strategy="full_prefill").report.to_html()
    assert "cache not used" in full
    assert "no scores" in full
    assert "stage I: scoring" not in full


def test_jupyter_gets_a_piece_with_its_own_style(engine: ProphetKVEngine) -> None:
    html = engine.prefill(PROMPT).report._repr_html_()
    assert html.startswith('<div class="pkv"><style>')
    assert html.endswith("</div>")
    assert "<html" not in html
