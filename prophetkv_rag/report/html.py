"""A reuse report as HTML: one self-contained piece, without scripts, readable in dark and light.

All text that comes from prompts is escaped: chunks are other people's documents. Shades say how much the question
attended to a token, an underline that it was recomputed; neither needs the other, nor colour vision.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Protocol

from prophetkv_rag.report.chunk_report import ChunkReport
from prophetkv_rag.report.timings import Timings
from prophetkv_rag.report.view import PromptView, SegmentView, TokenView


class Drawable(Protocol):
    """What is drawn of a prefill; `ReuseReport`, which draws itself with this module, is one."""

    strategy: str
    recompute_ratio: float
    prompt_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    fresh_tokens: int
    remembered_tokens: int
    moved_tokens: int
    chunks: list[ChunkReport]
    timings_s: Timings

    @property
    def view(self) -> PromptView | None:
        """The prompt token by token."""


STAGES = {
    "match": "finding the chunks",
    "load": "loading their caches",
    "assemble": "placing them",
    "score": "stage I: scoring",
    "recompute": "stage II: recomputing",
    "suffix": "computing the rest",
}
STATUSES = {
    "hit": "from cache",
    "miss": "was not cached",
    "corrupt": "cache was damaged",
    "unused": "cache not used",
    "remembered": "from the conversation",
    "moved": "from the conversation, where it stood elsewhere",
}
SEGMENTS = {"prefix": "Before the chunks", "glue": "Between chunks", "suffix": "After the chunks: the question"}

STYLE = """
.pkv{--ink:#23262b;--soft:#626a73;--line:#dcdfe3;--page:#fff;--panel:#f5f6f7;--mark:#0b6e69;--shade:214,138,20;--k:1;
 --c1:#8b97a3;--c2:#5f8fb5;--c3:#9a86c4;--c4:#d68a14;--c5:#0b8a83;--c6:#b5655f;color-scheme:light;
 color:var(--ink);background:var(--page);font:15px/1.6 system-ui,-apple-system,"Segoe UI",sans-serif;
 padding:24px;border-radius:10px;max-width:960px;margin:0 auto;box-sizing:border-box;text-align:left}
@media (prefers-color-scheme:dark){.pkv{--ink:#e4e6e8;--soft:#9aa3ad;--line:#363c43;--page:#191c20;--panel:#22262b;
 --mark:#5cc9c1;--shade:205,135,30;--k:.75;color-scheme:dark}}
.pkv *{box-sizing:border-box}
.pkv h1{font-size:22px;line-height:1.3;margin:0 0 8px}
.pkv h2{font-size:14px;margin:0;font-weight:600}
.pkv .answer{margin:0 0 20px;white-space:pre-wrap;overflow-wrap:anywhere}
.pkv .sum{color:var(--soft);margin:0 0 16px}
.pkv .sum b{color:var(--ink);font-weight:600}
.pkv .bar{display:flex;height:12px;border-radius:6px;overflow:hidden;background:var(--panel);gap:1px}
.pkv .bar i{display:block;min-width:2px}
.pkv .keys{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 20px;padding:0;list-style:none;
 color:var(--soft);font-size:13px}
.pkv .keys i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.pkv .legend{border:1px solid var(--line);border-radius:8px;padding:8px 14px;font-size:13px;color:var(--soft);
 display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 20px}
.pkv section{border:1px solid var(--line);border-radius:8px;margin:0 0 12px;overflow:hidden}
.pkv section>header{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline;background:var(--panel);
 padding:8px 14px;font-size:13px;color:var(--soft)}
.pkv section>header code{font-size:12px}
.pkv pre{margin:0;padding:12px 14px;white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.75 ui-monospace,
 SFMono-Regular,Menlo,Consolas,monospace;color:var(--ink);background:none;border:0}
.pkv .plain pre{color:var(--soft)}
.pkv .kept{border-left:4px solid var(--c3)}
.pkv .r{text-decoration:underline 2px var(--mark);text-underline-offset:3px;text-decoration-skip-ink:none}
""" + "".join(
    f".pkv .s{level}{{background:rgba(var(--shade),calc({alpha}*var(--k)))}}\n"
    for level, alpha in enumerate((0.08, 0.16, 0.26, 0.38, 0.52, 0.68), start=1)
)


def page(report: Drawable, *, title: str, answer: str | None) -> str:
    """Return the report as a whole page; see `ReuseReport.to_html`."""
    head = f"<h1>{escape(title)}</h1>" + (f'<p class="answer">{escape(answer)}</p>' if answer else "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>body{{margin:0}}@media (prefers-color-scheme:dark)"
        "{body{background:#191c20}}</style></head><body><main>"
        f"{fragment(report, head=head)}</main></body></html>\n"
    )


def fragment(report: Drawable, *, head: str = "") -> str:
    """Return the report as one element with its own style; `head` is HTML that is put in front."""
    parts = [f'<div class="pkv"><style>{STYLE}</style>', head, _summary(report), _timings(report)]
    if report.view is None:
        parts.append('<p class="sum">This copy of the report no longer holds its prompt.</p>')
    else:
        parts += [_legend(report.view), *_segments(report.view)]
    return "".join([*parts, "</div>"])


def _summary(report: Drawable) -> str:
    hits = sum(chunk.status == "hit" for chunk in report.chunks)
    wanted = sum(chunk.status != "remembered" for chunk in report.chunks)
    remembered = f"<b>{report.remembered_tokens:,} remembered</b> + " if report.remembered_tokens else ""
    moved = f" ({report.moved_tokens:,} of these two from former messages)" if report.moved_tokens else ""
    return (
        f'<p class="sum"><b>{escape(report.strategy)}</b> at {report.recompute_ratio:.0%}: '
        f"{report.prompt_tokens:,} prompt tokens = {remembered}<b>{report.reused_tokens:,} reused</b> + "
        f"{report.recomputed_tokens:,} recomputed{moved} + {report.fresh_tokens:,} fresh; "
        f"{hits} of {wanted} chunks from cache; first token after <b>{_time(report.timings_s.ttft)}</b></p>"
    )


def _timings(report: Drawable) -> str:
    found = [(name, getattr(report.timings_s, name)) for name in STAGES]
    found = [(name, seconds) for name, seconds in found if seconds > 0]
    total = sum(seconds for _, seconds in found)
    if not total:
        return ""
    colours = {name: f"var(--c{number})" for number, name in enumerate(STAGES, start=1)}
    bar = "".join(f'<i style="flex:{seconds / total:.5f};background:{colours[name]}"></i>' for name, seconds in found)
    keys = "".join(
        f'<li><i style="background:{colours[name]}"></i>{STAGES[name]} {_time(seconds)}</li>' for name, seconds in found
    )
    return f'<div class="bar" aria-hidden="true">{bar}</div><ul class="keys" aria-label="Time by stage">{keys}</ul>'


def _legend(view: PromptView) -> str:
    said = ['<span><span class="r">underlined</span>: recomputed</span>', "<span>not underlined: reused</span>"]
    if view.num_remembered:
        said.append('<span class="kept">&nbsp;at this edge: from the conversation, not computed again</span>')
    if view.scores is None:
        said.append("<span>no scores: this strategy did not ask which tokens matter</span>")
    else:
        shades = "".join(f'<span class="s{level}">&nbsp;&nbsp;</span>' for level in range(1, 7))
        said.append(f"<span>{shades} stronger shade: the question attends more to it (strongest: the top 2%)</span>")
    return f'<p class="legend">{"".join(said)}</p>'


def _segments(view: PromptView) -> Iterator[str]:
    number = 0
    for segment in view.segments:
        if segment.kind == "chunk":
            number += 1
            yield _chunk(view, segment, number)
        else:
            is_kept = segment.status != "fresh"
            title = "Earlier in the conversation" if is_kept and number else SEGMENTS[segment.kind]
            said = STATUSES.get(segment.status, "computed")
            if segment.status == "moved":
                said += f", {sum(token.recomputed for token in segment.tokens)} recomputed"
            count = _tokens(len(segment.tokens))
            yield (
                f'<section class="plain{" kept" * is_kept}"><header><h2>{title}</h2><span>{count}, {said}</span>'
                f"</header><pre>{escape(segment.text)}</pre></section>"
            )


def _chunk(view: PromptView, segment: SegmentView, number: int) -> str:
    recomputed = sum(token.recomputed for token in segment.tokens)
    text = "".join(_run(view, tokens) for tokens in _characters(segment.tokens))
    key = escape(segment.key or "")
    kept = " class=kept" if segment.status == "remembered" else ""
    status = STATUSES.get(segment.status, escape(segment.status))
    return (
        f"<section{kept}><header><h2>Chunk {number}</h2><span>{status}</span>"
        f"<span>{_tokens(len(segment.tokens))}, {recomputed} recomputed</span>"
        f'<code title="{key}">{key[:12]}</code></header><pre>{text}</pre></section>'
    )


def _characters(tokens: tuple[TokenView, ...]) -> Iterator[list[TokenView]]:
    """Yield tokens one by one, but those of one character together."""
    held: list[TokenView] = []
    for token in tokens:
        held.append(token)
        if token.text:
            yield held
            held = []
    if held:
        yield held


def _run(view: PromptView, tokens: list[TokenView]) -> str:
    scores = [token.score for token in tokens if token.score is not None]
    score = max(scores, default=None)
    is_recomputed = any(token.recomputed for token in tokens)
    shade = view.shade(score)
    names = (["r"] if is_recomputed else []) + ([f"s{shade}"] if shade else [])
    text = "".join(token.text for token in tokens)
    if not names:
        return escape(text)
    word = text.lstrip() or text  # most tokens begin with a space, which is drawn plain
    space = text[: len(text) - len(word)]
    said = "recomputed" if is_recomputed else "reused"
    title = said if score is None else f"{said}, score {score:.4g}"
    return f'{space}<span class="{" ".join(names)}" title="{title}">{escape(word)}</span>'


def _tokens(number: int) -> str:
    return "1 token" if number == 1 else f"{number:,} tokens"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "under 1 ms"
