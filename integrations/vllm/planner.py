"""The scheduler's half: finds chunks in requests' token ids, salts their blocks, and says when they are filled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.vllm.awaited import AwaitedCaches
from prophetkv_rag.integrations.vllm.known import Filling, KnownRequest
from prophetkv_rag.integrations.vllm.lookup import ChunkLookup
from prophetkv_rag.integrations.vllm.messages import LoadPlan, StepPlan, StepReport
from prophetkv_rag.integrations.vllm.registration import Registrations
from prophetkv_rag.integrations.vllm.settings import NAME, ConnectorSettings, RequestOptions
from prophetkv_rag.integrations.vllm.turns import Former, Turns
from prophetkv_rag.integrations.vllm.written import WrittenRows
from prophetkv_rag.store import CacheIdentity
from prophetkv_rag.store.disk import DiskStore

logger = logging.getLogger(__name__)

_MOST_PARTS = 8
"""Forwards that stage II of one request may take; a request with more rows is left to vLLM, which spreads it out."""


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
        block_size: Rows of one of vLLM's blocks.
        can_read: Whether a former turn's rows are there to be read.
        salt: Keeps a request's blocks apart from all others'; as `salted`.
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
        block_size: int,
        can_read: bool,
        salt: Callable[..., int | None],
    ) -> None:
        self._store = store
        self._identity = identity
        self._settings = settings
        self._vocabulary = vocabulary
        self._num_layers = num_layers
        self._max_rows = max_rows
        self._max_positions = max_positions
        self._max_stage_tokens = settings.max_stage_tokens or max_rows
        self._block_size = block_size
        self._salt = salt
        self.chunks = ChunkLookup(store, identity)
        self._known: dict[str, KnownRequest] = {}
        self._turns = Turns(block_size)
        self._written = WrittenRows(block_size)
        self._can_read = can_read
        self._refused: dict[str, str] = {}
        self._loads: list[LoadPlan] = []
        self._admitted_rows = 0
        self.registrations = Registrations(
            store, identity, settings.placed, max_tokens=min(max_rows, self._max_stage_tokens)
        )
        self.counts: dict[str, float] = {}
        self.awaited = AwaitedCaches(
            settings.read_ahead_s, settings.ram_bytes, size_of=self.chunks.nbytes, count=self._count
        )
        self.chunks.refresh()

    def begin(self, request: Any) -> None:
        """Look at a request before vLLM looks into its prefix cache."""
        self._written.add(request)
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
        elif ratio == 0 and first_chunk == "exact":
            first_chunk = "opening"  # nothing is
        found = self.chunks.find(ids, first_chunk)
        if found is None:
            return
        known = KnownRequest(request, ids, found, ratio, first_chunk, options.question_ids, self._identity.prefix_ids)
        if known.num_chunk_tokens < self._settings.min_chunk_tokens:
            return
        former = self._turns.find(known.settings, known.plain, ids, known.chunk_rows)
        before = known.shared(self._block_size).num_same * self._block_size if self._can_read else 0
        if not former.num_same and self._is_too_long(known.filling(before)):
            self._count("too_long", 1)
            return
        if not self._put_apart(known, former):
            return
        self._known[request.request_id] = known
        self._await_caches(known)

    def _put_apart(self, known: KnownRequest, former: Former) -> bool:
        """Salt a request's blocks, behind those of a former turn, or else behind those whose rows are exact.

        Returns:
            Whether that could be done.
        """
        salt, before = known.salt(self._identity.fingerprint), known.shared(self._block_size)
        is_turn = former.num_same >= max(before.num_same, 1)
        taken = self._salt(known.request, salt, former if is_turn else before)
        if is_turn and taken and not self._is_worth(known.filling(taken * self._block_size)):
            taken = self._salt(known.request, salt, former, is_apart=False)  # vLLM computes what is new, all of it
        if taken is None:
            return False
        rows = taken * self._block_size
        known.num_taken, known.num_plain = (rows, 0) if is_turn else (0, rows)
        return True

    def _await_caches(self, known: KnownRequest) -> None:
        request_id, found = known.request.request_id, known.found
        keys = known.filling(known.num_taken).keys  # what is shared may not be there
        if not self._is_worth(known.filling(known.num_taken or (known.num_plain if self._can_read else 0))):
            return
        missing = {key: job for key, job in found.missing.items() if key in keys}
        if missing:
            self.registrations.await_caches(request_id, missing)
        self.awaited.expect(request_id, [key for key in keys if key not in missing], found.first_key)

    def _is_worth(self, filling: Filling) -> bool:
        """Whether so many known tokens are new that their caches are used; of a turn, a whole block at least is new."""
        is_many = filling.num_chunk_tokens >= self._settings.min_chunk_tokens
        is_block = not filling.num_held or filling.num_new > self._block_size
        return is_many and is_block and not self._is_too_long(filling)

    def _is_too_long(self, filling: Filling) -> bool:
        longest = max((len(job.input_ids) for job in filling.missing), default=0)
        rows = max(filling.stage_one, longest, filling.stage_two // _MOST_PARTS)
        return rows > self._max_rows or filling.num_positions > self._max_positions

    def claim(self, request: Any, num_local: int) -> int | None:
        """Return how many tokens behind the first `num_local` will be filled; `None` to be asked in the next step."""
        if self.registrations.is_waiting(request.request_id):
            return None
        known = self._known.get(request.request_id)
        if known is None or known.is_left:
            return 0
        if num_local < known.num_taken:  # vLLM needed the room of the former turn's blocks
            blocks = num_local // self._block_size
            if not self._put_apart(known, Former(tuple(request.block_hashes[:blocks]), blocks)):
                return self._leave(known, "its blocks cannot be told apart from others")
            self._await_caches(known)
            return self.claim(request, num_local)
        if errors := self.registrations.errors(request.request_id):
            return self._leave(known, next(iter(errors.values())))
        known.first_row, known.num_held = num_local, known.num_taken or self._shared(known, num_local)
        filling = known.filling(known.num_held)
        is_filled = self._is_worth(filling) and (self._can_read or not known.num_taken)
        if not is_filled or not filling.has_chunks_behind(num_local):
            return 0  # vLLM computes the rest over the rows that are there
        taken = self._admitted_rows + self.registrations.reserved
        if taken and taken + filling.num_rows > self._max_stage_tokens:
            return None
        is_ready = self.awaited.is_ready(request.request_id, filling.keys, known.found.first_key)
        return filling.stop - num_local if is_ready and self._written.are_there(request, known.num_held) else None

    def _shared(self, known: KnownRequest, num_local: int) -> int:
        """Return how many of the rows that are shared the prefix cache has, if they are worth reading."""
        rows = min(num_local, known.num_plain)
        return rows if self._can_read and rows > known.num_opening else 0

    def admit(self, request: Any, block_ids: list[int], count: int) -> None:
        """Fill a request in this step, or see it begin otherwise."""
        known = self._known.get(request.request_id)
        if known is None:
            return
        self.awaited.finish(request.request_id)
        if count == 0:
            return
        filling = known.filling(known.num_held)
        self._written.fill(request.request_id, known.first_row)
        self._loads.append(filling.plan(request.request_id, block_ids, len(known.input_ids) - 1 - count))
        self._admitted_rows += filling.num_rows
        known.loaded(filling, {key: self.chunks.version(key) for key in filling.keys}, self._num_layers)

    def step(self) -> StepPlan:
        """Return what the workers do in this step, and begin the next."""
        encode = self.registrations.next_jobs(self._max_stage_tokens - self._admitted_rows)
        plan = StepPlan(self._identity, self._loads, encode, self.awaited.next_jobs())
        for load in self._loads:
            report = self._known[load.request_id].report
            assert report is not None
            self._count("requests", 1)
            for name in ("chunk_tokens", "reused_tokens", "recomputed_tokens"):
                self._count(name, report[name])
        self._loads, self._admitted_rows = [], 0
        self._written.next_step()
        return plan

    def learn(self, report: StepReport) -> None:
        """Take in what the workers say."""
        self._can_read = self._can_read and report.can_read
        self.awaited.learn(report)
        for key in report.lost:
            self.chunks.lose(key)
        for request_id, reason in report.failed.items():
            known = self._known.get(request_id)
            if known is not None:
                self._leave(known, reason)
        for request_id, seconds in report.seconds.items():
            self._count("stage_seconds", seconds)
            known = self._known.get(request_id)
            if known is not None and known.report is not None:
                known.report.setdefault("stage_s", round(seconds, 4))
        for key in report.not_encoded:
            self.chunks.give_up(key)
        for key, job in self.registrations.learn(report).items():
            if job.kept_with:
                self._count("second_caches", 1)
            else:
                self.chunks.add(key, job.input_ids)
                self._count("encoded_chunks", 1)

    def _leave(self, known: KnownRequest, reason: str) -> int:
        """Leave a request to vLLM: asked again, after a preemption, it must not fail again and again."""
        self._count("failed_requests", 1)
        known.is_left = True
        known.report = known.report_of_vllm(self._num_layers) | {"status": "left_to_vllm", "reason": reason}
        return 0

    def finish(self, request: Any) -> dict[str, Any] | None:
        """Return what a request's answer says, and forget it."""
        request_id = request.request_id
        self._written.remove(request_id)
        self.awaited.finish(request_id)
        refused = self._refused.pop(request_id, None)
        if refused is not None:
            return {NAME: {"error": refused}}
        registered = self.registrations.finish(request_id)
        if registered is not None:
            return {NAME: registered}
        known = self._known.pop(request_id, None)
        if known is None:
            return None
        if request.num_computed_tokens >= len(known.input_ids):
            whole = request.block_hashes[: request.num_computed_tokens // self._block_size]
            self._turns.keep(known.settings, known.plain, known.input_ids, known.chunk_rows, whole)
        report = known.report or known.report_of_vllm(self._num_layers)
        self._count("remembered_tokens", report["remembered_tokens"])
        return {NAME: report}

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
