"""Reads from the remote tier, each in a thread that nobody has to wait for."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

from prophetkv_rag.errors import BlobError
from prophetkv_rag.forks import around_fork
from prophetkv_rag.store import ChunkCache
from prophetkv_rag.store.remote.tier import RemoteTier

logger = logging.getLogger(__name__)

NUM_THREADS = 8
MAX_IN_FLIGHT = 64
"""Reads begun and not yet kept; what is asked for beyond is computed."""
MAX_READY_BYTES = 256 << 20
"""What was read, has no place in RAM or on disk, and waits for the prompt that it was read for."""
_FRESH_S = 10.0  # for as long the remote is not asked again for what it did not have


@dataclass(frozen=True, slots=True)
class Found:
    """What a read came to.

    Attributes:
        cache: The checked cache; `None` for none that can be used, and after a mere look.
        is_there: Whether there is something that can be used.
        was_bad: Whether there was something that failed its checks.
        data: The blob's bytes.
    """

    cache: ChunkCache | None = None
    is_there: bool = False
    was_bad: bool = False
    data: bytes = b""


@dataclass(slots=True, eq=False)
class Fetch:
    """One read on its way."""

    key: str
    fingerprint: str
    is_look: bool
    is_used: bool
    begun: float
    started: float | None = None
    is_taken: bool = False
    future: Future[Found] = field(default_factory=Future)


class Fetches:
    """Begins reads, waits for them up to the time-out, and hands what came to the store, also when it came too late.

    Threads that hang are left behind: they keep neither a query nor the end of the process waiting.

    Args:
        tier: The remote.
        keep: Called in the thread with what was read, after whoever waits has it; says whether it has a place now.
    """

    def __init__(self, tier: RemoteTier, keep: Callable[[Fetch, Found], bool]) -> None:
        self._tier = tier
        self._keep = keep
        self._lock = threading.Lock()
        self._ready: OrderedDict[str, Fetch] = OrderedDict()
        self._ready_bytes = 0
        self._is_closed = False
        self._prompt = threading.local()
        self._begin_anew()
        around_fork(self, "_lock", in_child=Fetches._begin_anew)

    def _begin_anew(self) -> None:
        """Begin with nothing on its way: in a child, the threads that read are the parent's."""
        self._in_flight: dict[str, Fetch] = {}
        self._queue: queue.SimpleQueue[Fetch | None] = queue.SimpleQueue()
        self._num_threads = 0

    def expect(self, keys: Iterable[str], fingerprint: str) -> None:
        """Begin to read what this thread's prompt is about to ask for; all of it together has one time-out.

        Those that only find room later get what is left of it then (`expected`).
        """
        keys = list(keys)
        begun = time.monotonic()
        fetches = self.begin(keys, fingerprint, begun=begun)
        self._prompt.expected = {key: (begun, key in fetches) for key in keys}

    def expected(self, key: str) -> tuple[float | None, bool]:
        """When this thread's prompt began to wait for a key, and whether it is being read since then; told once."""
        expected: dict[str, tuple[float | None, bool]] = getattr(self._prompt, "expected", {})
        return expected.pop(key, (None, False))

    def begin(
        self,
        keys: Iterable[str],
        fingerprint: str,
        *,
        is_look: bool = False,
        is_used: bool = True,
        begun: float | None = None,
    ) -> dict[str, Fetch]:
        """Begin to read those keys that it makes sense to ask for now; returns the reads on their way.

        Args:
            keys: Cache keys.
            fingerprint: Their fingerprint.
            is_look: Only find out whether they are there.
            is_used: Whether a prompt is about to have them.
            begun: When the prompt began to wait, by the monotonic clock; `None` for now.
        """
        fetches = {}
        is_late = begun is not None and time.monotonic() - begun >= self._tier.timeout_s
        for key in keys:
            with self._lock:
                fetch = self._in_flight.get(key) or self._fresh(key)
                is_full = len(self._in_flight) >= MAX_IN_FLIGHT or self._is_closed
            if fetch is None and not (is_full or is_late) and self._may_ask(fingerprint, key):
                new = Fetch(key, fingerprint, is_look, is_used, time.monotonic() if begun is None else begun)
                with self._lock:
                    fetch = self._in_flight.setdefault(key, new)
                if fetch is new:
                    self._submit(fetch)
            if fetch is not None and fetch.fingerprint == fingerprint:
                fetches[key] = fetch
        return fetches

    def wait(self, fetch: Fetch) -> Found:
        """Return what a read came to; nothing, if it takes longer than the time-out from when it was begun."""
        with self._lock:
            fetch.is_taken = True
            self._forget(fetch.key)
        left = fetch.begun + self._tier.timeout_s - time.monotonic()
        try:
            return fetch.future.result(max(0.0, left))
        except FutureTimeoutError:
            # One that had to wait for its turn has not had its time: there are many chunks, and it is not slow.
            if fetch.started is not None and time.monotonic() - fetch.started > 0.9 * self._tier.timeout_s:
                self._tier.failed(self._tier.reads, TimeoutError(f"no answer in {self._tier.timeout_s:g} s"))
            return Found()

    def drop(self, keys: Iterable[str]) -> None:
        """Forget what was read of these and waits to be taken."""
        with self._lock:
            for key in keys:
                self._forget(key)
                if key in self._in_flight:
                    self._in_flight[key].is_taken = True  # so that it is not kept for anybody when it comes

    def flush(self) -> None:
        """Wait until what was begun has been kept, as long as a query would wait."""
        deadline = time.monotonic() + self._tier.timeout_s
        while time.monotonic() < deadline:
            with self._lock:
                if not self._in_flight:
                    return
            time.sleep(0.002)

    def close(self) -> None:
        """Begin nothing any more, and keep nothing of what still comes."""
        with self._lock:
            self._is_closed = True
            count = self._num_threads
        for _ in range(count):
            self._queue.put(None)

    def _may_ask(self, fingerprint: str, key: str) -> bool:
        """Whether to ask; the breaker is looked at last, since it counts whom it lets through."""
        tier = self._tier
        return tier.is_usable(key) and not tier.records.is_doomed(fingerprint, key) and tier.reads.allows()

    def _submit(self, fetch: Fetch) -> None:
        with self._lock:
            needs_thread = self._num_threads < min(NUM_THREADS, len(self._in_flight))
            self._num_threads += needs_thread
            number = self._num_threads
        if needs_thread:  # a daemon, as a thread pool's threads would keep a process from ending
            threading.Thread(target=self._work, name=f"prophetkv-remote-{number}", daemon=True).start()
        self._queue.put(fetch)

    def _work(self) -> None:
        while (fetch := self._queue.get()) is not None:
            found = Found()
            try:
                found = self._read(fetch)
            except Exception:
                logger.exception("reading from the remote tier failed")
            finally:
                fetch.future.set_result(found)
            self._done(fetch, found)
            del fetch, found  # not while waiting for the next

    def _done(self, fetch: Fetch, found: Found) -> None:
        has_place = False
        try:
            has_place = found.is_there and not self._is_closed and self._keep(fetch, found)
        except Exception as error:  # the disk is full, the store was closed: what was read has been handed over
            logger.debug("the chunk cache %s was not kept: %s", fetch.key, error)
        nbytes = found.cache.nbytes if found.cache is not None else 0
        with self._lock:
            self._in_flight.pop(fetch.key, None)
            if not (has_place or fetch.is_taken or fetch.is_look or self._is_closed):
                self._ready[fetch.key] = fetch
                self._ready_bytes += nbytes
                while self._ready_bytes > MAX_READY_BYTES or len(self._ready) > MAX_IN_FLIGHT:
                    self._forget(next(iter(self._ready)))

    def _fresh(self, key: str) -> Fetch | None:
        fetch = self._ready.get(key)
        if fetch is None:
            return None
        if fetch.future.result().cache is None and time.monotonic() - fetch.begun > _FRESH_S:
            self._forget(key)
            return None
        return fetch

    def _forget(self, key: str) -> None:
        fetch = self._ready.pop(key, None)
        cache = fetch.future.result().cache if fetch is not None else None
        self._ready_bytes -= cache.nbytes if cache is not None else 0

    def _read(self, fetch: Fetch) -> Found:
        tier = self._tier
        fetch.started = time.monotonic()
        if fetch.started - fetch.begun > tier.timeout_s and fetch.is_used:
            return Found()  # nobody waits any more, and the remote has enough to do
        found = Found()
        try:
            if fetch.is_look:
                size = tier.files.size(fetch.fingerprint, fetch.key)
                found = Found(is_there=size is not None)
            else:
                data = tier.files.read(fetch.fingerprint, fetch.key)
                cache = tier.check(data, fetch.key, fetch.fingerprint)
                tier.set_usable(fetch.key, cache is not None)
                found = Found(cache, cache is not None, data=data)
        except FileNotFoundError:
            tier.count("misses")
        except BlobError as error:
            tier.found_bad(fetch.key, error)
            found = Found(was_bad=True)
        except Exception as error:
            tier.failed(tier.reads, error)
            return found
        if found.cache is not None:
            tier.count("hits")
        took = time.monotonic() - fetch.started
        if took > tier.timeout_s:
            tier.failed(tier.reads, TimeoutError(f"it took {took:.1f} s, longer than {tier.timeout_s:g} s"))
        else:
            tier.answered(tier.reads)
        return found
