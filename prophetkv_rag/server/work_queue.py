"""First come, first served: blocking work on the model, done by threads, for handlers that run in an event loop.

There are as many threads as answers that the engine works on at a time, which it decodes together. Whoever waits holds
a place in a bounded queue; giving up frees it at once, and giving up what runs already stops it at the model's next
step.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Generic, TypeVar

from prophetkv_rag.errors import DeadlineError
from prophetkv_rag.server.errors import as_api_error, queue_full, shutting_down

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_RETRY_AFTER_S = 60


class _Done:
    """Follows a ticket's last item."""


class Ticket(AsyncIterator[T], Generic[T]):
    """One piece of work in the queue, and what comes out of it: iterate over it in the event loop that made it.

    Attributes:
        cancel: Set when nobody wants the work any more; the work must look at it.
        started_at: When its turn came, by `time.monotonic()`; `None` while it waits.
    """

    def __init__(
        self,
        work: Callable[[Ticket[T]], Iterable[T]],
        deadline_s: float | None,
        on_dropped: Callable[[str], None] | None,
    ) -> None:
        self.cancel = threading.Event()
        self.created_at = time.monotonic()
        self.started_at: float | None = None
        self._work = work
        self._ends_at = math.inf if deadline_s is None else self.created_at + deadline_s
        self._loop = asyncio.get_running_loop()
        self.on_dropped = on_dropped
        self.timer: asyncio.TimerHandle | None = None
        self._items: asyncio.Queue[T | BaseException | _Done] = asyncio.Queue()

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline, or `None` without one."""
        return None if self._ends_at == math.inf else self._ends_at - time.monotonic()

    async def __anext__(self) -> T:
        """Return the next item, or raise what the work raised."""
        item = await self._items.get()
        if isinstance(item, _Done):
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def put(self, item: T | BaseException | _Done) -> None:
        """Hand an item over from any thread; a loop that has ended wants none."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            self.cancel.set()

    def run(self) -> None:
        """Do the work, in the queue's thread."""
        self.started_at = time.monotonic()
        last: BaseException | _Done = _Done()
        try:
            for item in self._work(self):
                self.put(item)
        except BaseException as error:
            last = error
        self.put(last)
        del last  # the error's frames hold this one, and the answer's cache: the collector must not be needed


class WorkQueue:
    """A bounded queue and its threads.

    `start`, `close` and `stop` are the application's, in its lifespan. Without one (an application that is mounted in
    another gets none) the first work starts the threads, and the end of the process stops it.
    """

    def __init__(self, name: str, *, max_waiting: int, num_threads: int = 1) -> None:
        """Make a queue in which `max_waiting` tickets may wait while so many threads work on others."""
        self.name = name
        self.max_waiting = max_waiting
        self.num_threads = num_threads
        self._changed = threading.Condition()
        self._waiting: deque[Ticket[object]] = deque()
        self._running: set[Ticket[object]] = set()
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        self._usual_s = 1.0  # how long a ticket takes, averaged over the last few

    def start(self) -> None:
        """Take work from now on, also after a `stop`."""
        with self._changed:
            self._is_closed = False
            self._ensure_threads()

    def _ensure_threads(self) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if self._threads:
            return
        # A thread that nobody stops must not keep the process: it ends before the interpreter takes its modules apart.
        for _ in range(self.num_threads):
            thread = threading.Thread(target=self._serve, name=f"prophetkv-{self.name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        atexit.register(self.stop)

    def close(self) -> None:
        """Take no more work and turn away what waits; what runs goes on."""
        with self._changed:
            self._is_closed = True
            turned_away = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for ticket in turned_away:
            self._drop(ticket, shutting_down())

    def stop(self) -> None:
        """Stop what runs too, and wait for the threads to end."""
        threads = self._threads
        self.close()
        with self._changed:
            for ticket in self._running:
                ticket.cancel.set()
        for thread in threads:
            thread.join()
        atexit.unregister(self.stop)

    @property
    def num_waiting(self) -> int:
        """Tickets whose turn has not come."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Tickets that are worked on."""
        return len(self._running)

    def submit(
        self,
        work: Callable[[Ticket[T]], Iterable[T]],
        *,
        deadline_s: float | None = None,
        on_dropped: Callable[[str], None] | None = None,
    ) -> Ticket[T]:
        """Give work a place in the queue; call from the event loop that iterates over the ticket.

        Args:
            work: Called in the queue's thread with the ticket; what it yields comes out of the ticket.
            deadline_s: Seconds from now; if its turn has not come by then, the ticket raises `DeadlineError`.
            on_dropped: Called with the reason if the ticket loses its place before its turn.

        Raises:
            ApiError: 429 if all places are taken, 503 if the queue is closed.
        """
        ticket = Ticket(work, deadline_s, on_dropped)
        with self._changed:
            if self._is_closed:
                raise shutting_down()
            self._ensure_threads()
            if len(self._waiting) + self.num_running >= self.max_waiting + self.num_threads:
                ahead = self.max_waiting / self.num_threads + 1
                raise queue_full(self.num_waiting, min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._usual_s * ahead))))
            self._waiting.append(ticket)  # type: ignore[arg-type]
            self._changed.notify()
        if deadline_s is not None:
            ticket.timer = asyncio.get_running_loop().call_later(deadline_s, self._expire, ticket)
        return ticket

    def give_up(self, ticket: Ticket[T]) -> None:
        """Nobody wants the ticket any more: free its place, or stop the work at the model's next step.

        Every ticket is given up in the end, also one whose work is done. Call from its event loop.
        """
        ticket.cancel.set()
        if ticket.timer is not None:
            ticket.timer.cancel()
        if self._withdraw(ticket) and ticket.on_dropped is not None:
            ticket.on_dropped("cancelled")

    def _withdraw(self, ticket: Ticket[T]) -> bool:
        with self._changed:
            try:
                self._waiting.remove(ticket)  # type: ignore[arg-type]
            except ValueError:
                return False
        return True

    def _expire(self, ticket: Ticket[T]) -> None:
        if self._withdraw(ticket):
            self._drop(ticket, DeadlineError("the deadline passed while the request waited for its turn"))

    def _drop(self, ticket: Ticket[T], error: Exception) -> None:
        ticket.put(error)
        if ticket.on_dropped is not None:
            ticket.on_dropped(as_api_error(error).code or "")

    def _serve(self) -> None:
        ticket: Ticket[object] | None = None
        while True:
            with self._changed:
                if ticket is not None:
                    self._running.discard(ticket)
                    ticket = None  # an idle thread must not keep the last answer
                while not self._is_closed and not self._waiting:
                    self._changed.wait()
                if not self._waiting:
                    self._threads.remove(threading.current_thread())  # the next start makes others
                    return
                ticket = self._waiting.popleft()
                self._running.add(ticket)
            started = time.monotonic()
            ticket.run()
            self._usual_s += 0.2 * (time.monotonic() - started - self._usual_s)
