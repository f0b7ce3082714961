"""A request whose prompt has known chunks: what is filled behind the rows that are there, and what is said of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prophetkv_rag.config import FirstChunk
from prophetkv_rag.integrations.vllm.lookup import Found
from prophetkv_rag.integrations.vllm.messages import EncodeJob, LoadPlan
from prophetkv_rag.integrations.vllm.plans import (
    follows_opening,
    layout_of,
    num_recomputed,
    stage_one_rows,
    stage_two_rows,
)
from prophetkv_rag.integrations.vllm.turns import ChunkRows, Former
from prophetkv_rag.once import once
from prophetkv_rag.prompt import PromptLayout, shared_length
from prophetkv_rag.reuse import ratio_by_encoding, token_budget


@dataclass
class KnownRequest:
    """One request, from its arrival to its end.

    Attributes:
        request: vLLM's.
        input_ids: Its prompt.
        found: The chunks in it.
        ratio: As it is asked for, or set; `None` for the default, which goes by how chunks were encoded.
        first_chunk: See `ProphetKVConfig`.
        question_ids: See `RequestOptions`.
        prefix_ids: What chunks are encoded behind.
        num_taken: Rows of a former turn that it was put behind.
        num_plain: Without one: exact rows at its beginning, in whole blocks that it shares with whoever begins alike.
        num_held: Rows that it reads, of either.
        first_row: Rows that were there when vLLM began it.
        is_left: Whether vLLM prefills it.
        report: What its answer will say.
    """

    request: Any
    input_ids: tuple[int, ...]
    found: Found
    ratio: float | None
    first_chunk: FirstChunk
    question_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    num_taken: int = 0
    num_plain: int = 0
    num_held: int = 0
    first_row: int = 0
    is_left: bool = False
    report: dict[str, Any] | None = None
    _filling: Filling | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._given = self.request.cache_salt
        self.plain = list(self.request.block_hashes)
        """vLLM's chain of the prompt's blocks, as it would be without us."""
        found = self.found
        self.chunk_rows = tuple(
            ChunkRows(key, match.start, match.stop, match.skipped, behind, version)
            for key, match, behind, version in zip(found.keys, found.matches, found.behind, found.versions, strict=True)
        )
        """Where the rows of each chunk came from."""

    @property
    def settings(self) -> str:
        """What turns of a conversation must have in common, beside tenant, tokens and caches."""
        return f"{self.ratio} {self.first_chunk}"

    @property
    def num_chunk_tokens(self) -> int:
        """Tokens of known chunks."""
        return sum(match.stop - match.start for match in self.found.matches)

    @once
    def num_opening(self) -> int:
        """Tokens that the prompt shares with what chunks are encoded behind, whose rows every worker has."""
        return shared_length(self.input_ids[: self.found.matches[0].start], self.prefix_ids)

    @once
    def is_behind_opening(self) -> bool:
        """Whether the first chunk's rows are exact as they are cached: nothing else than the opening is before it."""
        is_first = follows_opening(self.input_ids, self.found.matches[0], self.prefix_ids)
        return is_first and not self.found.behind[0]

    @once
    def default_ratio(self) -> float:
        """What is recomputed where nobody says, by how the prompt's chunks were encoded."""
        lengths = [match.stop - match.start for match in self.found.matches]
        is_alone = [not keys for keys in self.found.behind]
        has_exact_first = self.is_behind_opening or self.first_chunk == "exact"
        return ratio_by_encoding(lengths, is_alone, has_exact_first=has_exact_first)

    def shared(self, block_size: int) -> Former:
        """Return vLLM's own chain of the blocks whose rows are exact, whoever computes them.

        They end where the first chunk begins, or ends if it is recomputed whole. A block at least is left, so that
        there is one to be told apart from others'.
        """
        first = self.found.matches[0]
        stop = first.stop if self.first_chunk == "exact" and not self.is_behind_opening else first.start
        blocks = min(stop // block_size, len(self.plain) - 1)
        return Former(tuple(self.plain[:blocks]), blocks) if blocks > 0 else Former()

    def salt(self, fingerprint: str) -> str:
        """Return what approximate blocks are told apart by.

        Every row depends on the question at the prompt's end, so it holds all of the prompt, and what its rows are made
        of: the caches, since what a chunk was encoded behind may be deleted and it encoded anew, and the settings.
        """
        parts = [self._given, fingerprint, self.settings, self.question_ids, self.input_ids]
        rows = [
            [row.key, row.start, row.stop, row.skipped, row.behind, row.version if row.behind else 0]
            for row in self.chunk_rows
        ]
        return "prophetkv-" + hashlib.sha256(json.dumps([*parts, rows]).encode()).hexdigest()

    def filling(self, num_held: int) -> Filling:
        """Return what is filled behind so many rows."""
        if self._filling is None or self._filling.num_held != num_held:
            self._filling = Filling(self, num_held)
        return self._filling

    def loaded(self, filling: Filling, versions: Mapping[str, int], num_layers: int) -> None:
        """Take note of the caches that are used now; some may have been computed since the request came."""
        rows = self.chunk_rows
        self.chunk_rows = tuple(replace(row, version=versions.get(row.key, row.version)) for row in rows)
        self.report = {"status": "reused"} | filling.report(num_layers)

    def report_of_vllm(self, num_layers: int) -> dict[str, Any]:
        """Return what is said of a request of which vLLM computes what is not there."""
        return {"status": "prefix_cache"} | self.filling(self.first_row).report(num_layers, is_by_vllm=True)


class Filling:
    """What is filled of a request behind the rows that it goes on from, and what that costs."""

    def __init__(self, known: KnownRequest, num_held: int) -> None:
        self._known, self.num_held = known, num_held
        found = known.found
        rest = [number for number, match in enumerate(found.matches) if match.stop > num_held]
        matches = []
        for match in (found.matches[number] for number in rest):
            gone = max(0, num_held - match.start)  # a chunk that begins in the rows that are there
            matches.append(replace(match, start=match.start + gone, skipped=match.skipped + gone))
        self.keys = [found.keys[number] for number in rest]
        """Of the caches that are used."""
        self._load = LoadPlan(
            "",
            known.input_ids,
            tuple(matches),
            tuple(found.behind[number] for number in rest),
            found.first_key if rest[:1] == [0] else "",
            known.first_chunk if rest[:1] == [0] else "cached",
            known.default_ratio if known.ratio is None else known.ratio,
            known.question_ids,
            (),
            0,
            num_held,
        )

    @once
    def layout(self) -> PromptLayout:
        """The prompt, with the chunks that are filled."""
        return layout_of(self._load, self._known.prefix_ids)

    @property
    def missing(self) -> list[EncodeJob]:
        """The caches among them that must be computed first."""
        return [self._known.found.missing[key] for key in self.keys if key in self._known.found.missing]

    @property
    def num_chunk_tokens(self) -> int:
        """Tokens of the chunks that are filled."""
        return sum(match.stop - match.start for match in self._load.matches)

    @property
    def stop(self) -> int:
        """Rows are filled up to it: all but the last, which is vLLM's."""
        return len(self._known.input_ids) - 1

    @property
    def num_new(self) -> int:
        """Rows that are filled."""
        return self.stop - self.num_held

    @property
    def num_positions(self) -> int:
        """Positions that the stages need."""
        return len(self._known.input_ids) + len(self._known.question_ids)

    @once
    def stage_one(self) -> int:
        """Rows that stage I runs, if it runs."""
        return stage_one_rows(self.layout)

    @once
    def stage_two(self) -> int:
        """Rows that stage II runs."""
        return stage_two_rows(self.layout, self._load.recompute_ratio, self._load.first_chunk)

    @property
    def num_rows(self) -> int:
        """Rows that both run."""
        return self.stage_one + self.stage_two

    def has_chunks_behind(self, row: int) -> bool:
        """Whether a chunk has tokens from that row on, but for the prompt's last: else there is nothing to reuse."""
        return any(max(match.start, row) < min(match.stop, self.stop) for match in self._load.matches)

    def plan(self, request_id: str, block_ids: Sequence[int], first_row: int) -> LoadPlan:
        """Return what the workers are told; rows before `first_row` are there."""
        return replace(self._load, request_id=request_id, block_ids=tuple(block_ids), first_row=first_row)

    def report(self, num_layers: int, *, is_by_vllm: bool = False) -> dict[str, Any]:
        """Return what is said of it; `is_by_vllm` if vLLM computes it all."""
        load, known, chunk_tokens, fresh = self._load, self._known, self.num_chunk_tokens, self.num_new + 1
        fresh -= chunk_tokens
        if is_by_vllm or not chunk_tokens:
            recomputed, row_layers = chunk_tokens, (self.num_new + 1) * num_layers
        else:
            layout = self.layout
            recomputed = num_recomputed(layout, load.recompute_ratio, load.first_chunk)
            has_choice = 0 < token_budget(load.recompute_ratio, chunk_tokens) < int(layout.is_chunk.sum())
            row_layers = (self.stage_two + 1 + self.stage_one * has_choice) * num_layers
            fresh -= max(0, layout.known_prefix - self.num_held)
        begun = len(known.found.matches) - len(load.matches)
        status = ["remembered"] * begun
        status += ["unused" if is_by_vllm else "miss" if key in known.found.missing else "hit" for key in self.keys]
        return {
            "strategy": "prophetkv",
            "recompute_ratio": load.recompute_ratio if load.matches else known.ratio or 0.0,
            "prompt_tokens": len(known.input_ids),
            "remembered_tokens": self.num_held,
            "chunk_tokens": chunk_tokens,
            "reused_tokens": chunk_tokens - recomputed,
            "recomputed_tokens": recomputed,
            "row_layers": row_layers,
            "charged_ratio": (row_layers - fresh * num_layers) / (known.num_chunk_tokens * num_layers),
            "chunks": [
                {"key": key, "start": match.start, "stop": match.stop, "status": one, "behind": len(behind)}
                for key, match, one, behind in zip(
                    known.found.keys, known.found.matches, status, known.found.behind, strict=True
                )
            ],
        }
