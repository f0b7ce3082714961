"""vLLM with our connector in this process, and our engine on the same checkpoint, to compare with."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.integrations.vllm import settings
from prophetkv_rag.integrations.vllm.turns import Turns

ANSWER = 12
"""Tokens of every answer."""


def transfer_config(directory, **extra) -> dict[str, Any]:
    return settings.transfer_config(settings.ConnectorSettings(directory=str(directory), min_chunk_tokens=16, **extra))


AS_IN_VLLM = ProphetKVConfig(remember=False)
"""Settings with which our engine does what the connector does: both's defaults."""


class Served:
    """A model in vLLM and in our engine.

    Attributes:
        llm: vLLM.
        engine: Ours.
        directory: Where vLLM's caches are.
    """

    def __init__(
        self,
        model: Path,
        directory: Path,
        *,
        extra: dict[str, Any] | None = None,
        engine_model: Path | None = None,
        **given: Any,
    ) -> None:
        """Load a model in both; `engine_model` is for ours where it cannot be the same."""
        self.directory = directory
        self.llm = LLM(
            str(model),
            **(
                {
                    "dtype": "float32",
                    "enforce_eager": True,
                    "max_model_len": 2048,
                    "max_num_seqs": 8,
                    "disable_log_stats": False,
                    "kv_transfer_config": transfer_config(directory, **(extra or {})),
                }
                | given
            ),
        )
        dtype = getattr(torch, given.get("dtype", "float32"))
        self.engine = ProphetKVEngine.from_pretrained(engine_model or model, config=AS_IN_VLLM, dtype=dtype)
        self.texts: list[str] = []

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def planner(self) -> Any:
        return self.scheduler.connector._planner

    @property
    def stages(self) -> Any:
        return get_kv_transfer_group().stages

    def register(self, texts: list[str], *, in_order: bool = False) -> list[str]:
        """Register chunks with both; returns vLLM's keys."""
        behind = [texts[:number] for number in range(len(texts))] if in_order else None
        self.engine.add_chunks(texts, behind=behind)
        self.texts += texts
        ids = [self.engine.library.tokens.chunk(text) for text in texts]
        (output,) = self.run([[1]], [{"register": ids, "in_order": in_order}], max_tokens=1)
        said = output.kv_transfer_params["prophetkv"]
        assert "errors" not in said
        return said["registered"]

    def ids(self, prompt: Any) -> list[int]:
        return self.engine.read(prompt).input_ids.tolist()

    def run(
        self,
        prompts: list[list[int]],
        options: list[Any] | None = None,
        *,
        max_tokens: int = ANSWER,
        tenant: str | None = None,
    ) -> list[Any]:
        """Send token ids, all at once; `options` are our part of `kv_transfer_params`, `tenant` vLLM's `cache_salt`."""
        said = options or [None] * len(prompts)
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                extra_args=None if one is None else {"kv_transfer_params": {"prophetkv": one}},
            )
            for one in said
        ]
        whose = {} if tenant is None else {"cache_salt": tenant}
        return self.llm.generate([{"prompt_token_ids": ids} | whose for ids in prompts], sampling, use_tqdm=False)

    def answers(self, prompts: list[Any], ratio: float | None = None, **options: Any) -> list[list[int]]:
        """Answers of vLLM with our connector, sent at once."""
        said = options if ratio is None else {"recompute_ratio": ratio} | options
        return [tokens(one) for one in self.run([self.ids(prompt) for prompt in prompts], [said] * len(prompts))]

    def full(self, prompts: list[Any]) -> list[list[int]]:
        """Answers of vLLM's own prefill."""
        return self.answers(prompts, enabled=False)

    def engine_answer(self, prompt: Any, **settings: Any) -> list[int]:
        """Our engine's answer, which goes on behind an end token as vLLM's does here."""
        result = self.engine.prefill(prompt, **settings)
        output = self.engine.model.generate(
            **result.inputs,
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[0, result.input_ids.shape[1] :].tolist()

    @contextmanager
    def selections(self):
        """Record what stage I selects: request by request, a set of positions."""
        found: list[set[int]] = []
        stages, strategy = self.stages, self.stages._strategy

        class Recording:
            def select(self, context):
                selection = strategy.select(context)
                found.append(set(selection.positions.tolist()))
                return selection

        stages._strategy = Recording()
        try:
            yield found
        finally:
            stages._strategy = strategy

    def forget_prefixes(self) -> None:
        """Empty vLLM's prefix cache."""
        assert self.llm.reset_prefix_cache()

    def forget_prompts(self) -> None:
        """Empty it, and our memory of former prompts."""
        self.forget_prefixes()
        self.planner._turns = Turns(self.planner._block_size)

    def close(self) -> None:
        if not hasattr(self, "llm"):
            return
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.engine
        gc.collect()


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def reuse(output: Any) -> dict[str, Any]:
    """Our part of what an answer says."""
    return (output.kv_transfer_params or {}).get("prophetkv", {})
