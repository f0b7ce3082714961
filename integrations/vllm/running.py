"""vLLM's asynchronous engine in this process: its event loop is a thread, its core another process."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from prophetkv_rag.errors import InputError, ProphetKVError
from prophetkv_rag.integrations.vllm.sampling import BACKEND
from prophetkv_rag.integrations.vllm.settings import ConnectorSettings, transfer_config

logger = logging.getLogger(__name__)

_DEFAULTS = {"disable_log_stats": False, "structured_outputs_config": {"backend": BACKEND}}
_POLL_S, _LOOK_S = 0.05, 1.0


class RunningVLLM:
    """vLLM, which any number of threads may ask; it takes and raises what `VLLMEngine` does."""

    def __init__(self, model: str, settings: ConnectorSettings, engine_args: Mapping[str, Any]) -> None:
        given = {"model": model, "kv_transfer_config": transfer_config(settings)}
        try:
            arguments = AsyncEngineArgs(**{**_DEFAULTS, **engine_args, **given})
        except TypeError as error:
            msg = f"vLLM does not take these settings: {error}; see `vllm serve --help`, with _ for -"
            raise InputError(msg) from error
        self.has_died = False
        self._closing = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="prophetkv-vllm", daemon=True)
        self._thread.start()
        try:
            self._llm: Any = self._wait(_started(arguments))
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._loop.stop)
            if isinstance(error, (RuntimeError, TypeError, ValueError)) and not isinstance(error, ProphetKVError):
                msg = f"vLLM does not start: {error}"
                raise ProphetKVError(msg) from error
            raise

    @property
    def config(self) -> Any:
        """VLLM's `VllmConfig`."""
        return self._llm.vllm_config

    def outputs(
        self,
        prompt: Mapping[str, Any],
        sampling: Any,
        cancel: threading.Event | None = None,
        ends_at: float | None = None,
    ) -> Iterator[Any]:
        """Yield vLLM's outputs of one request, and last "cancelled" or "deadline" if it ended so.

        Raises:
            ProphetKVError: If vLLM has died.
        """
        outputs: queue.Queue[Any] = queue.Queue()
        request_id = uuid.uuid4().hex
        task = asyncio.run_coroutine_threadsafe(
            _pump(self._llm.generate(prompt, sampling, request_id), outputs), self._loop
        )
        try:
            while True:
                if cancel is not None and cancel.is_set():
                    yield "cancelled"
                    return
                if ends_at is not None and time.monotonic() >= ends_at:
                    yield "deadline"
                    return
                try:
                    item = outputs.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, EngineDeadError):
                    msg = "vLLM has died: one of its processes ended, see above; start again"
                    raise ProphetKVError(msg) from item
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            task.cancel()  # which aborts the request in vLLM, if it is not done

    def watch(self, ended: Callable[[], None]) -> None:
        """Call `ended`, in a thread, should vLLM die: from then on every request is an error."""

        def look() -> None:
            while not self._closing.wait(_LOOK_S):
                if self._llm.errored:
                    self.has_died = True
                    logger.critical("vLLM has died; its own log says why")
                    ended()
                    return

        threading.Thread(target=look, name="prophetkv-vllm-watch", daemon=True).start()

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Stop vLLM."""
        self._closing.set()
        self._wait(_stopped(self._llm))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


async def _started(arguments: Any) -> Any:
    return AsyncLLM.from_engine_args(arguments)


async def _stopped(llm: Any) -> None:
    llm.shutdown()  # in its own loop, so that what waits for the core is told first


async def _pump(source: AsyncIterator[Any], outputs: queue.Queue[Any]) -> None:
    try:
        async for output in source:
            outputs.put(output)
        outputs.put(None)
    except Exception as error:
        outputs.put(error)
