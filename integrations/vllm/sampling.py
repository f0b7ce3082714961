"""What vLLM is asked for one answer: our settings as its `SamplingParams`, and grammars by its structured outputs.

Both hold answers to grammars by the same library, llguidance, so a grammar of ours goes to vLLM as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from prophetkv_rag.errors import InputError
from prophetkv_rag.generation import Grammar, GrammarCompiler
from prophetkv_rag.integrations.vllm.settings import NAME

BACKEND = "guidance"
"""vLLM's name for llguidance."""


class Sampling:
    """Makes the `SamplingParams` of one vLLM engine.

    Args:
        tokenizer: The model's, as transformers loads it.
        backend: vLLM's `structured_outputs_config.backend`.
    """

    def __init__(self, tokenizer: Any, backend: str) -> None:
        ends = getattr(tokenizer, "eos_token_id", None)
        self._grammars = GrammarCompiler(tokenizer, () if ends is None else (ends,))
        self._backend = backend

    def of(
        self,
        ours: Mapping[str, Any],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """Return what to ask vLLM; `ours` is our part of the request's `kv_transfer_params`.

        Raises:
            InputError: If the grammar cannot be kept.
        """
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=list(stop),
            max_tokens=max_tokens,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=None if grammar is None else self._held_to(grammar),
            extra_args={"kv_transfer_params": {NAME: dict(ours)}},
        )

    def _held_to(self, grammar: Grammar) -> StructuredOutputsParams:
        if self._backend not in (BACKEND, "auto"):
            msg = (
                f"tools and JSON schemas need vLLM's structured output backend {BACKEND!r}; this server was started "
                f"with structured_outputs_config.backend={self._backend!r}"
            )
            raise InputError(msg)
        self._grammars.start(grammar)  # what is wrong with it is said here; vLLM would say it less well, or not at all
        return StructuredOutputsParams(grammar=grammar.source)
