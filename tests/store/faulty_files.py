"""An fsspec file system in memory, `faulty://`, that does to its caller whatever a test asks for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FaultyFileSystem(MemoryFileSystem):
    """As memory, with faults; what it holds, and the faults, are the class's.

    Attributes:
        before: Called with a method's name and path before it does anything; may raise, or block.
        spoil: What is read goes through this.
        size: What is said about a file's size goes through this.
        calls: How often each method was called.
        most_bytes: The most that it ever held.
        listed: What it said last, and goes on to say until its cache is made invalid, as clients of object stores do.
    """

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    before: ClassVar[Callable[[str, str], object]]
    spoil: ClassVar[Callable[[bytes], bytes]]
    size: ClassVar[Callable[[int], Any]]
    calls: ClassVar[Counter[str]] = Counter()
    most_bytes: ClassVar[int] = 0
    listed: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("faulty://"))

    @classmethod
    def reset(cls) -> None:
        cls.before = staticmethod(lambda method, path: None)
        cls.spoil = staticmethod(lambda data: data)
        cls.size = staticmethod(lambda size: size)

    @classmethod
    def clear(cls) -> None:
        cls.store.clear()
        cls.calls.clear()
        cls.most_bytes = 0
        cls.reset()

    @classmethod
    def names(cls) -> list[str]:
        return sorted(cls.store)

    def _called(self, method: str, path: str) -> None:
        type(self).calls[method] += 1
        type(self).before(method, path)

    def info(self, path: str, **options: Any) -> Any:
        self._called("info", path)
        found = self.listed.get(self._strip_protocol(path)) or super().info(path, **options)
        return {**found, "size": type(self).size(found["size"])}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        self._called("cat_file", path)
        return type(self).spoil(super().cat_file(path, start, end, **options))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._called("pipe_file", path)
        super().pipe_file(path, value, mode, **options)
        type(self).most_bytes = max(self.most_bytes, sum(file.size for file in tuple(self.store.values())))

    def rm_file(self, path: str) -> None:
        self._called("rm_file", path)
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._called("rm", path)
        super().rm(path, recursive, maxdepth)

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        self._called("find", path)
        found = super().find(path, *arguments, **options)
        if options.get("detail"):
            type(self).listed = dict(found)
        return found

    def invalidate_cache(self, path: str | None = None) -> None:
        self.listed.clear()


FaultyFileSystem.reset()
fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


def raising(error: Exception, *methods: str) -> Callable[[str, str], None]:
    """Raise in these methods, or in all if none is named."""

    def before(method: str, path: str) -> None:
        if not methods or method in methods:
            raise error

    return before


@contextmanager
def hanging(*methods: str) -> Iterator[None]:
    """Block these methods, or all, until the block ends."""
    over = threading.Event()

    def before(method: str, path: str) -> None:
        if not methods or method in methods:
            over.wait(600)

    FaultyFileSystem.before = staticmethod(before)
    try:
        yield
    finally:
        over.set()
        FaultyFileSystem.reset()
