"""The scheduler's half: finds chunks in requests' token ids, salts their blocks, and says when they are filled."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.vllm.lookup import ChunkLookup, Found
from prophetkv_rag.integrations.vllm.messages import LoadPlan, StepPlan, StepReport
from prophetkv_rag.integrations.vllm.plans import (
    make_layout,
    num_recomputed,
    stage_one_rows,
    stage_two_rows,
    with_caches,
)
from prophetkv_rag.integrations.vllm.registration import Registrations
from prophetkv_rag.integrations.vllm.settings import NAME, ConnectorSettings, RequestOptions
from prophetkv_rag.prompt import PromptLayout
from prophetkv_rag.reuse import ratio_by_encoding, token_budget
from prophetkv_rag.store import CacheIdentity
from prophetkv_rag.store.disk import DiskStore

logger = logging.getLogger(__name__)

_MOST_PARTS = 8
"""Forwards that stage II of one request may take; a request with more rows is left to vLLM, which spreads it out."""


@dataclass
class _Known:
    """A request whose prompt has known chunks.

    Attributes:
        plan: What the workers will be told, but for the blocks.
        stage_rows: Rows that its stages run, both.
        report: What its answer will say.
        is_left: Whether vLLM prefills it.
    """

    plan: LoadPlan
    stage_rows: int
    report: dict[str, Any]
    is_left: bool = False


class Planner:
    """Decides for each request. Whatever is unknown, late or failed is left to vLLM's ordinary prefill.

    Args:
        store: Of this process.
        identity: Of the caches.
        settings: The connector's.
        vocabulary: Size of the model's.
        num_layers: The model's.
        max_rows: Rows that one forward may have.
        max_positions: Positions that the model has.
        salt: Keeps a request's blocks apart from all others'; returns whether that could be done.
    """

    def __init__(
        self,
        store: DiskStore,
        identity: CacheIdentity,
        settings: ConnectorSettings,
        *,
        vocabulary: int,
        num_layers: int,
        max_rows: int,
        max_positions: int,
        salt: Callable[[Any, str], bool],
    ) -> None:
        self._store = store
        self._identity = identity
        self._settings = settings
        self._vocabulary = vocabulary
        self._num_layers = num_layers
        self._max_rows = max_rows
        self._max_positions = max_positions
        self._max_stage_tokens = settings.max_stage_tokens or max_rows
        self._salt = salt
        self.chunks = ChunkLookup(store, identity)
        self._known: dict[str, _Known] = {}
        self._refused: dict[str, str] = {}
        self._loads: list[LoadPlan] = []
        self._ahead: list[str] = []
        self._second_ahead: list[str] = []
        self._admitted_rows = 0
        self.registrations = Registrations(
            store, identity, count=settings.placed.count, max_tokens=min(max_rows, self._max_stage_tokens)
        )
        self.counts: dict[str, float] = {}
        self.chunks.refresh()

    def begin(self, request: Any) -> None:
        """Look at a request before vLLM looks into its prefix cache."""
        try:
            options = RequestOptions.of(request.kv_transfer_params, vocabulary=self._vocabulary)
            if options.register:
                if not self._settings.may_register:
                    msg = "this server takes no chunks from requests (may_register is false)"
                    raise InputError(msg)
                self.registrations.begin(request.request_id, options, most=self._max_rows)
                return
        except InputError as error:
            self._refused[request.request_id] = str(error)
            return
        if options.enabled and _is_plain(request):
            self._find(request, options)

    def _find(self, request: Any, options: RequestOptions) -> None:
        ids = tuple(request.prompt_token_ids)
        ratio = self._settings.recompute_ratio if options.recompute_ratio is None else options.recompute_ratio
        first_chunk = options.first_chunk or self._settings.first_chunk
        if ratio == 1:
            first_chunk = "cached"  # it is computed anyway
        found = self.chunks.find(ids, first_chunk)
        if found is None:
            return
        layout = make_layout(ids, found.matches, options.question_ids, self._identity.prefix_ids)
        if layout.num_chunk_tokens < self._settings.min_chunk_tokens:
            return
        layout = with_caches(layout, found.behind)
        if ratio is None:
            lengths = [len(chunk.input_ids) for chunk in layout.chunks]
            is_alone = [not keys for keys in found.behind]
            ratio = ratio_by_encoding(lengths, is_alone, has_exact_first=layout.exact_first_chunk)
        one, two = stage_one_rows(layout), stage_two_rows(layout, ratio, first_chunk)
        longest = max((len(job.input_ids) for job in found.missing.values()), default=0)
        if (
            max(one, longest, two // _MOST_PARTS) > self._max_rows
            or len(ids) + len(options.question_ids) > self._max_positions
        ):
            self._count("too_long", 1)
            return
        plan = LoadPlan(
            request.request_id,
            ids,
            found.matches,
            found.behind,
            found.first_key,
            first_chunk,
            ratio,
            options.question_ids,
            (),
            0,
        )
        if not self._salt(request, _salt_of(plan, found, request.cache_salt, self._identity.fingerprint)):
            return
        report = self._report_of(plan, found, layout, one, two)
        self._known[request.request_id] = _Known(plan, one + two, report)
        if found.missing:
            self.registrations.await_caches(request.request_id, found.missing)
        ready = [key for key in found.keys if key not in found.missing]
        self._ahead += [key for key in ready if key != found.first_key]
        self._second_ahead += [key for key in ready if key == found.first_key]

    def _report_of(self, plan: LoadPlan, found: Found, layout: PromptLayout, one: int, two: int) -> dict[str, Any]:
        recomputed = num_recomputed(layout, plan.recompute_ratio, plan.first_chunk)
        has_choice = 0 < token_budget(plan.recompute_ratio, layout.num_chunk_tokens) < int(layout.is_chunk.sum())
        row_layers = (two + 1 + one * has_choice) * self._num_layers
        unavoidable = (layout.num_tokens - layout.num_chunk_tokens - layout.known_prefix) * self._num_layers
        return {
            "strategy": "prophetkv",
            "recompute_ratio": plan.recompute_ratio,
            "prompt_tokens": layout.num_tokens,
            "chunk_tokens": layout.num_chunk_tokens,
            "reused_tokens": layout.num_chunk_tokens - recomputed,
            "recomputed_tokens": recomputed,
            "row_layers": row_layers,
            "charged_ratio": (row_layers - unavoidable) / (layout.num_chunk_tokens * self._num_layers),
            "chunks": [
                {
                    "key": match.key,
                    "start": match.start,
                    "stop": match.stop,
                    "status": "miss" if key in found.missing else "hit",
                    "behind": len(behind),
                }
                for key, match, behind in zip(found.keys, plan.matches, plan.behind, strict=True)
            ],
        }

    def claim(self, request: Any, num_local: int) -> int | None:
        """Return how many tokens behind the first `num_local` will be filled; `None` to be asked in the next step."""
        if self.registrations.is_waiting(request.request_id):
            return None
        known = self._known.get(request.request_id)
        if known is None or known.is_left:
            return 0
        if errors := self.registrations.errors(request.request_id):
            self._leave(known, next(iter(errors.values())))
            return 0
        wanted = len(known.plan.input_ids) - 1 - num_local
        if wanted <= 0:  # the same prompt's blocks are there already
            return 0
        taken = self._admitted_rows + self.registrations.reserved
        if taken and taken + known.stage_rows > self._max_stage_tokens:
            return None
        return wanted

    def admit(self, request: Any, block_ids: list[int], count: int) -> None:
        """Fill a request in this step."""
        known = self._known.get(request.request_id)
        if known is None or count == 0:
            return
        first = len(known.plan.input_ids) - 1 - count
        self._loads.append(replace(known.plan, block_ids=tuple(block_ids), first_row=first))
        self._admitted_rows += known.stage_rows
        known.report["status"] = "reused"

    def step(self) -> StepPlan:
        """Return what the workers do in this step, and begin the next."""
        encode = self.registrations.next_jobs(self._max_stage_tokens - self._admitted_rows)
        plan = StepPlan(self._identity, self._loads, encode, self._ahead, self._second_ahead)
        for load in self._loads:
            report = self._known[load.request_id].report
            self._count("requests", 1)
            for name in ("chunk_tokens", "reused_tokens", "recomputed_tokens"):
                self._count(name, report[name])
        self._loads, self._ahead, self._second_ahead, self._admitted_rows = [], [], [], 0
        return plan

    def learn(self, report: StepReport) -> None:
        """Take in what the workers say."""
        for key in report.lost:
            self.chunks.lose(key)
        for request_id, reason in report.failed.items():
            known = self._known.get(request_id)
            if known is not None:
                self._leave(known, reason)
        for request_id, seconds in report.seconds.items():
            self._count("stage_seconds", seconds)
            if request_id in self._known:
                self._known[request_id].report.setdefault("stage_s", round(seconds, 4))
        for key in report.not_encoded:
            self.chunks.give_up(key)
        for key, job in self.registrations.learn(report).items():
            if job.kept_with:
                self._count("second_caches", 1)
            else:
                self.chunks.add(key, job.input_ids)
                self._count("encoded_chunks", 1)

    def _leave(self, known: _Known, reason: str) -> None:
        """Leave a request to vLLM: asked again, after a preemption, it must not fail again and again."""
        self._count("failed_requests", 1)
        known.is_left = True
        known.report |= {"status": "left_to_vllm", "reason": reason, "reused_tokens": 0}

    def finish(self, request: Any) -> dict[str, Any] | None:
        """Return what a request's answer says, and forget it."""
        request_id = request.request_id
        refused = self._refused.pop(request_id, None)
        if refused is not None:
            return {NAME: {"error": refused}}
        registered = self.registrations.finish(request_id)
        if registered is not None:
            return {NAME: registered}
        known = self._known.pop(request_id, None)
        return None if known is None else {NAME: {"status": "prefix_cache"} | known.report}

    def _count(self, name: str, value: float) -> None:
        self.counts[name] = self.counts.get(name, 0) + value


def _is_plain(request: Any) -> bool:
    """Whether a request is a prompt of token ids and nothing else."""
    return bool(
        request.prompt_token_ids
        and request.pooling_params is None
        and request.lora_request is None
        and not request.mm_features
        and not getattr(request, "skip_reading_prefix_cache", False)
    )


def _salt_of(plan: LoadPlan, found: Found, given: str | None, fingerprint: str) -> str:
    """Return what an approximate prompt's blocks are told apart by.

    Every row depends on the question at the prompt's end, so only requests that are the same throughout share blocks;
    and only while the caches are the same: what a chunk was encoded behind may be deleted, and it encoded anew.
    """
    parts: list[Any] = [given, fingerprint, plan.recompute_ratio, plan.question_ids, plan.input_ids]
    parts += [plan.first_chunk, plan.first_key, plan.behind, found.versions]
    parts += [[match.key, match.start, match.stop, match.skipped] for match in plan.matches]
    return "prophetkv-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()
