"""What the scheduler's connector sends to the workers' with each step, and what they send back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from prophetkv_rag.config import FirstChunk
from prophetkv_rag.prompt import TokenMatch
from prophetkv_rag.store import CacheIdentity


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """A cache to compute and store.

    Attributes:
        input_ids: The chunk's tokens.
        behind: Keys of the chunks that stand before it, the last one right before it.
        is_chained: Whether those come as they are stored, or each encoded for itself alone: neighbours.
        kept_with: Of a second cache, encoded behind the opening alone: the key of its chunk. Else "".
    """

    input_ids: tuple[int, ...]
    behind: tuple[str, ...] = ()
    kept_with: str = ""
    is_chained: bool = True

    @property
    def num_tokens(self) -> int:
        """Tokens to run: neighbours may have to be run, too, and are taken for as long as the chunk."""
        return len(self.input_ids) * (1 if self.is_chained else 1 + len(self.behind))


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One request whose prompt is filled in this step, but for its last token.

    Attributes:
        request_id: vLLM's.
        input_ids: The whole prompt, N tokens.
        matches: The chunks in it that stand behind the rows that are held, or what stands there of the first of them.
        behind: For each of them, the keys of the chunks that its cache was encoded behind.
        first_key: Key of the second cache that the first chunk is taken from; "" for its own.
        first_chunk: See `ProphetKVConfig`.
        recompute_ratio: Share of their tokens that is recomputed.
        question_ids: See `RequestOptions`.
        block_ids: All blocks of the request.
        first_row: Rows before it are in the blocks already.
        num_held: So many of those are a former prompt's, which this one goes on from; the stages read them.
    """

    request_id: str
    input_ids: tuple[int, ...]
    matches: tuple[TokenMatch, ...]
    behind: tuple[tuple[str, ...], ...]
    first_key: str
    first_chunk: FirstChunk
    recompute_ratio: float
    question_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    first_row: int
    num_held: int = 0


@dataclass(frozen=True, slots=True)
class ReadJob:
    """Caches of a request that is filled later.

    Attributes:
        number: Of this job alone.
        keys: What to read into RAM.
        first_key: The one among them that is a second cache; "" for none.
    """

    number: int
    keys: tuple[str, ...]
    first_key: str = ""


@dataclass
class StepPlan(KVConnectorMetadata):
    """What the workers do before a step's forward.

    Attributes:
        identity: Of the caches; second caches have its `opening_of`.
        loads: Requests to fill.
        encode: Key -> what to encode and store under it; what stands behind others comes after them.
        read_ahead: What will be wanted soon.
        is_idle: Whether vLLM computes nothing in this step.
    """

    identity: CacheIdentity
    loads: Sequence[LoadPlan] = ()
    encode: dict[str, EncodeJob] = field(default_factory=dict)
    read_ahead: Sequence[ReadJob] = ()
    is_idle: bool = False


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """What came of a `StepPlan`.

    Attributes:
        seconds: Request -> time that the workers spent on its step's loads, all requests of the step together.
        failed: Request -> why it was left to vLLM.
        lost: Keys whose cache is missing or bad.
        encoded: Keys that are stored now.
        not_encoded: Key -> why it is not.
        can_read: Whether rows can be read from vLLM's pages.
        num_ranks: Workers that say this; what follows they say one after the other, so it may stand there as often.
        read: Numbers of the `ReadJob`s of which all is read that can be.
        came: Keys whose caches came into RAM.
        went: Those that left it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    not_encoded: dict[str, str] = field(default_factory=dict)
    can_read: bool = True
    num_ranks: int = 1
    read: list[int] = field(default_factory=list)
    came: list[str] = field(default_factory=list)
    went: list[str] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        """Put two workers' reports together: what one could not do has failed."""
        assert isinstance(other, StepReport)
        return StepReport(
            {**self.seconds, **other.seconds},
            {**self.failed, **other.failed},
            list(dict.fromkeys([*self.lost, *other.lost])),
            list(dict.fromkeys([*self.encoded, *other.encoded])),
            {**self.not_encoded, **other.not_encoded},
            self.can_read and other.can_read,
            self.num_ranks + other.num_ranks,
            [*self.read, *other.read],
            [*self.came, *other.came],
            [*self.went, *other.went],
        )
