"""`prophetkv-rag index --engine vllm` and a server of its database, each in processes of its own, as a user has them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess

import httpx
import pytest

from prophetkv_rag.cli.database_settings import require_settings
from prophetkv_rag.cli.indexing import split_texts
from prophetkv_rag.integrations.vllm.identity import opening_of
from prophetkv_rag.store.disk import open_disk_store
from tests.tiny import save_tiny, text_of, tiny_tokenizer
from tests.vllm.running import PROGRAM, VLLM_ARGS, serving
from tests.vllm.test_models import SHAPE

FILES = {f"{name}.txt": " ".join(text_of(60, seed=10 * seed + part) for part in range(4)) for seed, name in enumerate("abc")}
NEW = " ".join(text_of(60, seed=90 + part) for part in range(4))
CHUNK_SIZE = 100


def index(place, *arguments):
    command = [PROGRAM, "index", str(place / "documents"), "--db", str(place / "db"), "--json", *arguments]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with documents and a database of them, of a model that is beside it."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "model", **SHAPE)
    (place / "documents").mkdir()
    for name, text in FILES.items():
        (place / "documents" / name).write_text(text)
    report = index(
        place,
        *("--engine", "vllm", "--model", str(place / "model"), "--chunk-size", str(CHUNK_SIZE)),
        *("--cache-format", "bf16", "--vllm-args", json.dumps(VLLM_ARGS)),
    )
    assert report["caches"]["chunks"] == report["planned"]["chunks"] == report["total_chunks"] > 9
    assert abs(report["caches"]["nbytes"] / report["planned"]["nbytes"] - 1) < 0.05
    return place
