"""What one prefill did: plain numbers only, so that it can travel through events, logs and JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from prophetkv_rag.report.chunk_report import ChunkReport, ChunkTier
from prophetkv_rag.report.html import fragment, page
from prophetkv_rag.report.timings import Timings
from prophetkv_rag.report.view import PromptView


class _Viewed:
    """Holds a report's view beside its fields: it is for looking at, so it is neither compared, printed nor pickled."""

    __slots__ = ("_view",)
    _view: PromptView

    @property
    def view(self) -> PromptView | None:
        """The prompt token by token; `None` for a report that was copied deeply, unpickled, or made by hand."""
        return getattr(self, "_view", None)

    def attach_view(self, view: PromptView) -> None:
        """Give the report the view of its prompt."""
        self._view = view


@dataclass(slots=True)
class ReuseReport(_Viewed):
    """What was reused, what was computed, and how long it took.

    `prompt_tokens == remembered_tokens + reused_tokens + recomputed_tokens + fresh_tokens` and
    `chunk_tokens == reused_tokens + recomputed_tokens`; fresh tokens are those outside every chunk. Remembered tokens
    came from a former prompt and its answer, chunks in them included, and were not computed again; those of them that
    were are recomputed tokens. `moved_tokens` of the chunk tokens are no chunks' but former messages', which stood
    elsewhere when they were computed, since other chunks stood before them; the question chooses from them alike.
    `recomputed_tokens` ran through every layer. `row_layers` is what really ran: rows x layers at query time, stage I
    and layers run in full included. `charged_ratio` is that as a fraction of full prefill's work on the chunks: all
    rows x layers beyond one pass of the fresh tokens (without those that begin the prompt as they begin the encoding
    prefix, whose rows are only copied), over chunk tokens x layers. Strategies of one `recompute_ratio` may differ in
    it. A row that attends to a part of its context (`ProphetKVConfig.context_share`) is charged like any other;
    `attended_share` tells what was saved: the keys that the last pass's rows saw, as a share of all before them.

    The report of a prefill also knows its prompt: `view` has it token by token, `to_html()` draws it, and Jupyter shows
    that by itself.
    """

    strategy: str
    recompute_ratio: float
    prompt_tokens: int
    chunk_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    fresh_tokens: int
    row_layers: int = 0
    charged_ratio: float = 0.0
    attended_share: float = 1.0
    chunks: list[ChunkReport] = field(default_factory=list)
    timings_s: Timings = field(default_factory=Timings)
    remembered_tokens: int = 0
    moved_tokens: int = 0

    def to_html(self, *, title: str = "What was reused", answer: str | None = None) -> str:
        """Return a page of its own, without scripts or anything from elsewhere, that draws the prompt.

        It shows which tokens were reused and which recomputed, shaded by their stage-I score, each chunk's status and
        the stages' timings.

        Args:
            title: The page's heading, such as the question.
            answer: Shown under the heading.
        """
        return page(self, title=title, answer=answer)

    def _repr_html_(self) -> str:
        return fragment(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def tiers(self) -> dict[ChunkTier, int]:
        """How many chunks came from each tier; those that needed no cache are left out."""
        return dict(Counter(chunk.tier for chunk in self.chunks if chunk.tier))

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers; the shape that `prophetkv-rag ask --json` prints."""
        return asdict(self)

    def __str__(self) -> str:
        hits = sum(chunk.status == "hit" for chunk in self.chunks)
        wanted = sum(chunk.status != "remembered" for chunk in self.chunks)
        remembered = f"{self.remembered_tokens} remembered + " if self.remembered_tokens else ""
        moved = f" ({self.moved_tokens} of these two from former messages)" if self.moved_tokens else ""
        return (
            f"{self.strategy} at {self.recompute_ratio:.0%}: {self.prompt_tokens} prompt tokens = {remembered}"
            f"{self.reused_tokens} reused + {self.recomputed_tokens} recomputed{moved} + {self.fresh_tokens} fresh; "
            f"{hits}/{wanted} chunks from cache; first token after {self.timings_s.ttft:.2f} s"
        )
