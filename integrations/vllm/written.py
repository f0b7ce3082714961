"""Whether rows that a request would read from vLLM's pages are written before the step that is being planned."""

from __future__ import annotations

from typing import Any

from vllm.v1.request import RequestStatus


class WrittenRows:
    """The requests that vLLM has, and which rows each of them writes in this step; for one thread.

    vLLM's prefix cache finds blocks from the moment on when they are to be written, so a request may get some that
    another one writes in the very step in which it would read them.

    Args:
        block_size: Rows of one of vLLM's blocks.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._requests: dict[str, Any] = {}
        self._filled: dict[str, int] = {}

    def add(self, request: Any) -> None:
        """Know a request of vLLM's."""
        self._requests[request.request_id] = request

    def remove(self, request_id: str) -> None:
        """Forget one that has ended."""
        self._requests.pop(request_id, None)

    def fill(self, request_id: str, first_row: int) -> None:
        """Take note that a request's rows from this one on are filled in this step; vLLM counts them as computed."""
        self._filled[request_id] = first_row

    def next_step(self) -> None:
        """Begin another step: what was filled is written."""
        self._filled = {}

    def are_there(self, request: Any, count: int) -> bool:
        """Whether the first `count` rows, which the prefix cache has found for this request, are written by now."""
        if not count:
            return True
        mine = request.block_hashes
        for name, other in self._requests.items():
            if other is request or other.status != RequestStatus.RUNNING:
                continue
            block = self._filled.get(name, other.num_computed_tokens) // self._block_size
            theirs = other.block_hashes
            # Hashes are chained: with one in common, all before it are.
            if block * self._block_size < count and block < len(theirs) and theirs[block] == mine[block]:
                return False
        return True
