"""What is free on this machine, and how much of it chunk caches take where nobody says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

RAM_BYTES = 1 << 30
"""The RAM tier's bound where free memory cannot be told."""
_RAM_SHARE = 4
_DISK_SHARE = 2
_CGROUPS = (  # of containers: version 2, version 1
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_disk(path: Path) -> int:
    """Return the bytes that this user may still write below `path`, which need not be there yet.

    Raises:
        OSError: If the file system does not tell.
    """
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def free_memory() -> int | None:
    """Return the bytes of memory that can be taken without swapping, within a container's limit; `None` if unknown."""
    found = [_available(), *(_left_in_cgroup(Path(group), *names) for group, *names in _CGROUPS)]
    return min((free for free in found if free is not None), default=None)


def default_ram_bytes() -> int:
    """Return the RAM tier's bound: a quarter of what is free now."""
    free = free_memory()
    return RAM_BYTES if free is None else free // _RAM_SHARE


def default_disk_bytes(path: Path, held: int = 0) -> int:
    """Return a bound for caches below `path`: what they hold there, and half of what is free now.

    Raises:
        OSError: If the file system does not tell.
    """
    return held + free_disk(path) // _DISK_SHARE


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:  # free pages alone: what the system could give back of its file cache is not told
        return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows, macOS
        return None


def _left_in_cgroup(group: Path, most: str, used: str, reclaimable: str) -> int | None:
    try:
        left = int((group / most).read_text("ascii")) - int((group / used).read_text("ascii"))
        lines = (group / "memory.stat").read_text("ascii").splitlines()
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    # Files that were read lately count as used, and are given back when memory is asked for.
    return max(0, left + sum(int(line.split()[1]) for line in lines if line.startswith(f"{reclaimable} ")))
