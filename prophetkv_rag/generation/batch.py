"""Whole answers: to one prompt, or to several at once."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, overload

from prophetkv_rag.errors import InputError
from prophetkv_rag.generation.decode import GenerationResult, StreamChunk, whole_answer
from prophetkv_rag.generation.turns import Turns


class AnswersPrompts:
    """The half of an engine that gives answers at once."""

    turns: Turns

    def stream(self, *args: Any, **settings: Any) -> Generator[StreamChunk, None, None]:
        """Answer a prompt piece by piece."""
        raise NotImplementedError

    def generate(self, prompt: Any, **settings: Any) -> GenerationResult:
        """Answer a prompt at once; takes the arguments of `stream`."""
        return whole_answer(self.stream(prompt, **settings))

    @overload
    def generate_batch(
        self,
        prompts: Sequence[Any],
        *,
        each: Sequence[Mapping[str, Any]] | None = ...,
        return_exceptions: Literal[False] = ...,
        **settings: Any,
    ) -> list[GenerationResult]: ...

    @overload
    def generate_batch(
        self,
        prompts: Sequence[Any],
        *,
        each: Sequence[Mapping[str, Any]] | None = ...,
        return_exceptions: Literal[True],
        **settings: Any,
    ) -> list[GenerationResult | Exception]: ...

    def generate_batch(
        self,
        prompts: Sequence[Any],
        *,
        each: Sequence[Mapping[str, Any]] | None = None,
        return_exceptions: bool = False,
        **settings: Any,
    ) -> Any:
        """Answer several prompts, decoded together: as many at a time as `ProphetKVConfig.max_batch` says.

        Answers are those of `generate`, prompt by prompt, each with its own report; calls that other threads make
        meanwhile are decoded along. What is remembered of former prompts is used; prompts of one batch do not go on
        from each other.

        Args:
            prompts: As `stream` takes them.
            each: For each prompt, arguments of `stream` for it alone, such as a seed, or an event that cancels it.
            return_exceptions: Give a prompt's error in its place. Else the first one is raised, the others' answers
                are broken off and lost.
            **settings: Arguments of `stream` for all prompts.

        Returns:
            The prompts' answers, in their order.

        Raises:
            InputError: If `each` is not as long as `prompts`, and otherwise as `stream`.
        """
        own = [{} for _ in prompts] if each is None else each
        if isinstance(prompts, str) or len(own) != len(prompts):
            given = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts and {len(own)} entries in each"
            msg = f"generate_batch got {given}; give a list of prompts, and in each= as many mappings, or leave it out"
            raise InputError(msg)
        if not prompts:
            return []
        if len(prompts) == 1 and not return_exceptions:
            return [self.generate(prompts[0], **{**settings, **own[0]})]
        left = threading.Event()

        def answer(prompt: Any, more: Mapping[str, Any]) -> GenerationResult | Exception:
            given = {**settings, **more}
            try:
                return self.generate(prompt, **{**given, "cancel": _Either(left, given.get("cancel"))})
            except Exception as error:
                if not return_exceptions:
                    left.set()
                return error

        with ThreadPoolExecutor(min(len(prompts), self.turns.most), thread_name_prefix="prophetkv-batch") as pool:
            try:
                futures = [
                    pool.submit(contextvars.copy_context().run, answer, prompt, more)
                    for prompt, more in zip(prompts, own, strict=True)
                ]
                answers = [future.result() for future in futures]
            except BaseException:  # Ctrl+C: the threads are waited for, and must not go on
                left.set()
                raise
        errors = [found for found in answers if isinstance(found, Exception)]
        if errors and not return_exceptions:
            raise errors[0]
        return answers


class _Either(threading.Event):
    """Set when its owner's event is, or the batch is given up."""

    def __init__(self, left: threading.Event, own: threading.Event | None) -> None:
        super().__init__()
        self._left, self._own = left, own

    def is_set(self) -> bool:
        return self._left.is_set() or (self._own is not None and self._own.is_set())
