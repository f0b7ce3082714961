"""Whose turn it is to run the model: first come, first served, and what waits for the same kind of turn goes together.

Answers are driven by whoever reads them, each from a thread of its own: a framework's batch is many such calls at once.
A call that wants its next token waits here, and so do all others that want one; the first of them runs one forward for
all. So nobody collects calls beforehand, each call keeps its settings, its end and its errors to itself, and one that
leaves is just not there the next time. A call that needs the model for itself (a prefill) takes a turn alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from prophetkv_rag.forks import around_fork
from prophetkv_rag.model import PassJob, run_packed

MOST_ROWS = 1024
"""Most rows in a forward that several calls share; beyond that it gains nothing, and takes memory."""

PATIENCE = 0.25
PATIENCE_S = 0.05
"""How long a turn waits for calls that had the last one and choose their tokens: a share of that one's time, and so
many seconds at most.

Without it those that are quickest would run alone and the others after them, for ever.
"""


class Caller(Protocol):
    """A call as far as turns know it; see `InterruptibleLock`."""

    num_tokens: int

    def check(self) -> None:
        """Raise if the call must stop."""

    def slice_s(self) -> float | None:
        """Return how long to wait before asking again; `None` for as long as it takes."""

    def acquire(self) -> None:
        """Take the model's lock; raises if the call must stop."""


@dataclass(slots=True, eq=False)
class Step:
    """A forward that a call waits for.

    Attributes:
        job: Its rows, to be run beside others'.
        alone: Runs it where nobody else wants one.
        undo: Puts the job's pass and layers back, for another try.
        logits: Whether the last row's logits are wanted.
    """

    job: PassJob
    alone: Callable[[], torch.Tensor | None]
    undo: Callable[[], None]
    logits: bool = True


@dataclass(slots=True, eq=False)
class _Turn:
    caller: Caller
    step: Step | None
    thread: int = field(default_factory=threading.get_ident)
    is_done: bool = False
    has_run: bool = False
    logits: torch.Tensor | None = None
    error: BaseException | None = None


class Turns:
    """The turns of the calls on one engine.

    A new prompt's turn waits while so many answers are under way that a forward is full, or so many tokens that its own
    have no room beside them, so that many calls at once do not hold many caches. Where nothing is under way there is
    room for any prompt. An answer that nobody reads on does not count: it holds nobody up.

    Args:
        lock: The model's lock, which others know too; held during every turn.
        model: The language model.
        check: Called before it runs several steps; raises if it must not.
        most: Most steps in one forward.
        most_tokens: Most tokens of the prompts under way and their answers.
        shares_passes: Whether the stages of several prompts share forwards too.
    """

    def __init__(
        self,
        lock: threading.RLock,
        model: Any,
        check: Callable[[], None],
        *,
        most: int,
        most_tokens: int,
        shares_passes: bool = False,
    ) -> None:
        self.most, self.most_tokens = most, most_tokens
        self.shares_passes = shares_passes and most > 1
        self.lock = lock
        self._model, self._check = model, check
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._waiting: deque[_Turn] = deque()
        self._is_busy = False
        self._prefilling: set[Caller] = set()
        self._away: dict[Caller, int] = {}  # calls that will be back soon, and the thread that each ran in last
        self._away_until = self._began_at = 0.0
        around_fork(self, "_mutex", in_child=Turns._begin_anew)

    def _begin_anew(self) -> None:
        """Forget calls of threads that a fork left behind."""
        self._changed = threading.Condition(self._mutex)
        self._waiting.clear()
        self._away.clear()
        self._prefilling.clear()
        self._is_busy = False

    @property
    def is_held_here(self) -> bool:
        """Whether this thread has the model already: it must not wait for a turn then."""
        try:
            threading.Condition(self.lock).notify(0)
        except RuntimeError:
            return False
        return True

    def admit(self, caller: Caller) -> None:
        """Count a prompt as under way whose passes are steps, until it is `prefilled`; called in a turn alone."""
        with self._mutex:
            self._prefilling.add(caller)

    def prefilled(self, caller: Caller) -> None:
        """Say that a prompt that was admitted has run all its passes, or will not."""
        with self._changed:
            self._prefilling.discard(caller)
            self._away[caller] = threading.get_ident()
            self._away_until = max(self._away_until, time.monotonic() + PATIENCE_S)

    def begin(self, caller: Caller) -> None:
        """Wait for a turn alone and take the model's lock; `end` gives both back.

        Raises:
            Interrupted: If the call must stop.
        """
        self._wait(_Turn(caller, None))
        try:
            caller.acquire()
        except BaseException:
            self._end(())
            raise

    def end(self, caller: Caller) -> None:
        """End a turn alone."""
        self.lock.release()
        self._end([_Turn(caller, None, is_done=True)])

    def run(self, step: Step, caller: Caller) -> torch.Tensor | None:
        """Run a step, with others' that wait; returns its `[1, vocab]` logits, if they are wanted.

        Raises:
            Interrupted: If the call must stop before its step runs.
        """
        if self.is_held_here:
            return step.alone()
        turn = _Turn(caller, step)
        self._wait(turn)
        if not turn.is_done:
            self._lead(turn)
        logits, error = turn.logits, turn.error
        del turn, step  # an error's frames must not hold it, nor the answer's cache
        if error is not None:
            try:
                raise error
            finally:
                del error
        return logits

    def leave(self, caller: Caller) -> None:
        """Expect no more of a call."""
        with self._changed:
            if self._away.pop(caller, None) is not None:
                self._changed.notify_all()

    def _wait(self, turn: _Turn) -> None:
        """Wait until it is this turn's, which then has the turns for itself, or until another has run it."""
        with self._changed:
            self._away.pop(turn.caller, None)
            self._waiting.append(turn)
            self._changed.notify_all()  # somebody may be waiting for this one
            try:
                while not turn.is_done:
                    if turn in self._waiting:  # what runs already cannot be broken off
                        turn.caller.check()
                        if not self._is_busy and self._next() is turn:
                            self._waiting.remove(turn)
                            self._is_busy, self._began_at = True, time.monotonic()
                            return
                    self._changed.wait(self._patience(turn.caller))
            except BaseException:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                    self._changed.notify_all()
                raise

    def _patience(self, caller: Caller) -> float | None:
        slices = [] if (slice_s := caller.slice_s()) is None else [slice_s]
        if self._away and not self._is_busy:
            slices.append(max(0.0, self._away_until - time.monotonic()))
        return min(slices, default=None)

    def _next(self) -> _Turn | None:
        """Return whose turn it is; `None` while it pays to wait for more."""
        if self._away and time.monotonic() >= self._away_until:
            self._away.clear()
        steps = [turn.caller for turn in self._waiting if turn.step is not None]
        answering = {*steps, *self._away, *self._prefilling}
        room = self.most_tokens - sum(caller.num_tokens for caller in answering)
        has_room = len(answering) < self.most
        for turn in self._waiting:
            if turn.step is None:
                has_room &= not answering or turn.caller.num_tokens <= room
                if has_room:  # else nobody who came later goes first, however short
                    return turn
                continue
            is_full = len(steps) >= self.most
            # Two streams that one thread reads in turn never wait for each other.
            others = any(thread != turn.thread for thread in self._away.values())
            return None if others and not is_full else turn
        return None

    def _lead(self, turn: _Turn) -> None:
        pack = [turn]
        try:
            turn.caller.acquire()
            try:
                with self._mutex:
                    self._fill(pack)
                self._run(pack)
            finally:
                self.lock.release()
        finally:
            self._end(pack)

    def _fill(self, pack: list[_Turn]) -> None:
        """Take steps that wait into a pack, the first to come first, as long as there is room for the next."""
        rows = sum(turn.step.job.input_ids.shape[1] for turn in pack if turn.step is not None)
        for turn in list(self._waiting):
            if turn.step is not None:
                rows += turn.step.job.input_ids.shape[1]
                if rows > MOST_ROWS or len(pack) == self.most:
                    break
                self._waiting.remove(turn)
                pack.append(turn)

    def _run(self, pack: Sequence[_Turn]) -> None:
        """Run the steps of a pack, each of which then has its logits or an error of its own."""
        steps = [turn.step for turn in pack if turn.step is not None]
        try:
            if len(pack) > 1:
                self._check()
                wanted = [step.logits for step in steps]
                found = run_packed(self._model, [step.job for step in steps], logits=wanted)
                for turn, logits in zip(pack, found, strict=True):
                    turn.logits, turn.has_run = logits, True
                return
        except Exception:  # for want of memory, for one; or one of them is at fault, and shall have it alone
            for step in steps:
                step.undo()
        except BaseException:  # it is the leader's; the others take another turn
            for step in steps:
                step.undo()
            raise
        for turn, step in zip(pack, steps, strict=True):
            try:
                turn.logits, turn.has_run = step.alone(), True
            except Exception as error:
                turn.error = error

    def _end(self, pack: Sequence[_Turn]) -> None:
        with self._changed:
            self._is_busy = False
            now = time.monotonic()
            self._away_until = now + min(PATIENCE * (now - self._began_at), PATIENCE_S)
            for turn in pack:
                turn.is_done |= turn.has_run or turn.error is not None
                if turn.is_done:
                    self._away[turn.caller] = turn.thread
            self._waiting.extendleft(turn for turn in reversed(pack[1:]) if not turn.is_done)
            self._changed.notify_all()
