"""The connector that vLLM loads, once in its scheduler's process and once in each worker's.

What it promises vLLM: the rows of a whole prompt but for the last token, filled before the step's own forward. vLLM
then computes that token over them, samples and decodes, and batches it all with ordinary requests.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from prophetkv_rag.errors import ProphetKVError
from prophetkv_rag.integrations.vllm.identity import open_identity
from prophetkv_rag.integrations.vllm.messages import StepPlan, StepReport
from prophetkv_rag.integrations.vllm.planner import Planner
from prophetkv_rag.integrations.vllm.runner import VLLMRunner
from prophetkv_rag.integrations.vllm.settings import ConnectorSettings
from prophetkv_rag.integrations.vllm.stats import ProphetKVPromMetrics, ProphetKVStats
from prophetkv_rag.integrations.vllm.support import (
    check_config,
    check_pages,
    check_release,
    keeps_all_rows,
    probe_module,
)
from prophetkv_rag.integrations.vllm.turns import Former, salted
from prophetkv_rag.integrations.vllm.workers import WorkerStages

logger = logging.getLogger(__name__)


class ProphetKVConnector(KVConnectorBase_V1):
    """Name it in `vllm serve --kv-transfer-config`; see docs/vllm.md.

    Raises:
        InputError: For settings of vLLM, or in `kv_connector_extra_config`, that cannot be served.
        UnsupportedModelError: For a model whose caches cannot be re-positioned exactly.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = vllm_config
        check_release()
        check_config(vllm_config)
        check_pages(kv_cache_config)
        self._settings = ConnectorSettings.of(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self._num_blocks = 0 if kv_cache_config is None else kv_cache_config.num_blocks
        self._store = self._settings.open_store(
            ram_bytes=self._settings.ram_bytes if role == KVConnectorRole.WORKER else 0
        )
        self.stages: WorkerStages | None = None
        """The worker's half, once vLLM has its pages."""
        self._report: StepReport | None = None
        self._planner: Planner | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._planner = Planner(
                self._store,
                open_identity(vllm_config, self._settings),
                self._settings,
                vocabulary=vllm_config.model_config.get_vocab_size(),
                num_layers=vllm_config.model_config.hf_text_config.num_hidden_layers,
                max_rows=self._max_rows,
                max_positions=vllm_config.model_config.max_model_len,
                block_size=vllm_config.cache_config.block_size,
                can_read=keeps_all_rows(kv_cache_config),
                salt=self._salted,
            )

    # The scheduler's side, in the order of a request's life.

    @property
    def _planning(self) -> Planner:
        assert self._planner is not None, "only the scheduler's connector plans"
        return self._planner

    def on_new_request(self, request: Any) -> None:
        """Look for chunks, before vLLM looks into its prefix cache."""
        try:
            self._planning.begin(request)
        except ProphetKVError as error:
            logger.warning("request %s is left to vLLM: %s", request.request_id, error)

    def _salted(self, request: Any, salt: str, former: Former | None, *, is_apart: bool = True) -> int | None:
        """Keep a request's blocks apart from all others', but for those of a former turn; see `salted`."""
        if not self._config.cache_config.enable_prefix_caching:
            return 0
        found = salted(request, salt, former, is_apart=is_apart)
        if found is None:
            logger.warning("this release of vLLM cannot salt a request's blocks; it is left to vLLM")
        return found

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Claim all of a prompt but its last token, in this step; or nothing; or ask to be asked again."""
        return self._planning.claim(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Fill a request whose blocks are there."""
        self._planning.admit(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        """Return what the workers do in this step."""
        plan = self._planning.step()
        plan.is_idle = scheduler_output.total_num_scheduled_tokens == 0
        return plan

    def update_connector_output(self, connector_output: Any) -> None:
        """Take in what they did."""
        report = getattr(connector_output, "kv_connector_worker_meta", None)
        if isinstance(report, StepReport):
            self._planning.learn(report)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Return a request's report, which its answer carries in `kv_transfer_params`."""
        return False, self._planning.finish(request)

    # The workers' side, in the order of a step.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the loaded module, and probe it."""
        runner = VLLMRunner(self._config, list(kv_caches))
        with torch.inference_mode():
            support = probe_module(runner, self._config)
        self.stages = WorkerStages(
            runner,
            support,
            self._store,
            self._settings,
            block_size=self._config.cache_config.block_size,
            max_rows=self._max_rows,
            num_kv_heads=self._config.model_config.get_total_num_kv_heads(),
            num_blocks=self._num_blocks,
        )

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Begin to read ahead, beside the step's forward: where nothing is loaded, `start_load_kv` comes after it."""
        super().bind_connector_metadata(connector_metadata)
        if self.stages is not None and isinstance(connector_metadata, StepPlan):
            self.stages.read_ahead(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Fill this step's requests and encode its chunks; never raises."""
        plan = self._get_connector_metadata()
        if self.stages is not None and isinstance(plan, StepPlan):
            self._report = self.stages.run(plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are there."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved: chunks are encoded by passes of our own."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that vLLM has to compute itself."""
        if self.stages is None:
            return set()
        failed, self.stages.failed_blocks = self.stages.failed_blocks, set()
        return failed

    def build_connector_worker_meta(self) -> StepReport | None:
        """Return this step's report, for the scheduler's side."""
        report, self._report = self._report, None
        return report

    def shutdown(self) -> None:
        """Close the store."""
        self._store.close()

    # Counters.

    def get_kv_connector_stats(self) -> ProphetKVStats | None:
        """Return the scheduler's counts since the last look."""
        if self._planner is None or not self._planner.counts:
            return None
        counts, self._planner.counts = self._planner.counts, {}
        return ProphetKVStats(counts)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ProphetKVStats:
        """See vLLM."""
        return ProphetKVStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ProphetKVPromMetrics:
        """See vLLM."""
        return ProphetKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
