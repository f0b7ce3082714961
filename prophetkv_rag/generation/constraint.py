"""Answers held to a grammar: which tokens may come next, by llguidance, which was measured against its like.

`benchmarks/structured.py` prints the comparison: of the libraries it was the only one that refused what it could not
keep, and the fastest, without requirements of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from prophetkv_rag.errors import InputError
from prophetkv_rag.extras import needs
from prophetkv_rag.forks import around_fork
from prophetkv_rag.generation.grammar import Grammar

_LONGEST_ERROR = 400


class Constraint:
    """One answer's place in its grammar.

    Args:
        matcher: The library's.
        end_tokens: Tokens that end an answer.
    """

    def __init__(self, matcher: Any, end_tokens: Iterable[int]) -> None:
        self._matcher = matcher
        self._end_tokens = frozenset(end_tokens)

    @property
    def may_end(self) -> bool:
        """Whether what there is so far is a whole answer."""
        return bool(self._matcher.is_accepting())

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """Return `[1, vocab]` logits with minus infinity for tokens that may not come next.

        Raises:
            InputError: If the grammar has become too large for the library in this place.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.zeros(logits.shape[-1], dtype=bool)  # a model's vocabulary may be longer than its tokenizer's
        known = np.unpackbits(bits, bitorder="little")[: len(allowed)]
        allowed[: len(known)] = known
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Go on by a token that may come next."""
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        """Return, and go on by, the tokens that can only come next, if any: the model need not be asked."""
        taken: list[int] = []
        if not self.is_complete:
            for token in self._matcher.compute_ff_tokens():
                if token in self._end_tokens:
                    break
                self.take(token)
                taken.append(token)
        return taken

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(_refusal(self._matcher.get_error()))


class GrammarCompiler:
    """Makes constraints for one tokenizer, from any thread; the library's view of it is made at first use.

    Args:
        tokenizer: A transformers tokenizer on the `tokenizers` library, or `None`.
        end_tokens: Tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, end_tokens: Iterable[int]) -> None:
        self._tokenizer, self._end_tokens = tokenizer, sorted(end_tokens)
        self._view: Any = None
        self._lock = threading.Lock()
        around_fork(self, "_lock")

    def start(self, grammar: Grammar) -> Constraint:
        """Return a new answer's constraint.

        Raises:
            MissingExtraError: If the library is not installed.
            InputError: If the grammar cannot be kept: it is wrong, nothing can meet it, or it uses what the library
                does not know; or if the tokenizer is of a kind that it cannot read.
        """
        with needs("structured", "llguidance", what="an answer that must be JSON, or call a tool,"):
            from llguidance import LLMatcher
        matcher = LLMatcher(self._ready_view(), f"%llguidance {{}}\n{grammar.source}", log_level=0)
        if matcher.is_error():
            raise InputError(_refusal(matcher.get_error()))
        return Constraint(matcher, self._end_tokens)

    def _ready_view(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._view is None:
                backend = getattr(self._tokenizer, "backend_tokenizer", None)
                if backend is None or not hasattr(backend, "to_str"):
                    msg = (
                        f"answers cannot be held to a schema with a {type(self._tokenizer).__name__}; use a model "
                        "whose tokenizer is a fast one (it has a tokenizer.json), or leave schema and tools out"
                    )
                    raise InputError(msg)
                ends = self._end_tokens or [self._tokenizer.eos_token_id or 0]
                self._view = LLTokenizer(backend.to_str(), eos_token=ends)
            return self._view


def _refusal(error: str) -> str:
    """Say in one line why the library cannot keep a grammar, without the grammar that it quotes."""
    reason = error.split("\n")[0].strip().rstrip(":")
    reason = reason.partition("failed to compile JSON schema: ")[2] or reason
    return f"the schema cannot be kept: {reason[:_LONGEST_ERROR]}; change it, or leave it out and ask in the prompt"
