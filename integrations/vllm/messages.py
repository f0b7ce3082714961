"""What the scheduler's connector sends to the workers' with each step, and what they send back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from prophetkv_rag.prompt import TokenMatch


@dataclass(frozen=True, slots=True)
class Identity:
    """What workers need of a `CacheIdentity`."""

    fingerprint: str
    prefix_ids: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One request whose prompt is filled in this step, but for its last token.

    Attributes:
        request_id: vLLM's.
        input_ids: The whole prompt, N tokens.
        matches: The chunks in it.
        recompute_ratio: Share of their tokens that is recomputed.
        question_ids: See `RequestOptions`.
        block_ids: All blocks of the request.
        first_row: Rows before it are in the blocks already.
    """

    request_id: str
    input_ids: tuple[int, ...]
    matches: tuple[TokenMatch, ...]
    recompute_ratio: float
    question_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    first_row: int


@dataclass
class StepPlan(KVConnectorMetadata):
    """What the workers do before a step's forward.

    Attributes:
        identity: Of the caches.
        loads: Requests to fill.
        encode: Key -> token ids of chunks to encode and store.
        read_ahead: Keys whose caches will be wanted soon.
    """

    identity: Identity
    loads: Sequence[LoadPlan] = ()
    encode: dict[str, tuple[int, ...]] = field(default_factory=dict)
    read_ahead: Sequence[str] = ()


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """What came of a `StepPlan`.

    Attributes:
        seconds: Request -> time that the workers spent on its step's loads, all requests of the step together.
        failed: Request -> why it was left to vLLM.
        lost: Keys whose cache is missing or bad.
        encoded: Keys that are stored now.
        not_encoded: Key -> why it is not.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    not_encoded: dict[str, str] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        """Put two workers' reports together: what one could not do has failed."""
        assert isinstance(other, StepReport)
        return StepReport(
            {**self.seconds, **other.seconds},
            {**self.failed, **other.failed},
            list(dict.fromkeys([*self.lost, *other.lost])),
            list(dict.fromkeys([*self.encoded, *other.encoded])),
            {**self.not_encoded, **other.not_encoded},
        )
