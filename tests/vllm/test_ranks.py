"""Tensor parallel: two processes, each with some of the heads; blobs hold all of them and serve any number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from prophetkv_rag import ProphetKVEngine
from prophetkv_rag.store.disk import open_disk_store
from tests.tiny import save_tiny, text_of
from tests.vllm.serving import ANSWER, AS_IN_VLLM
from tests.vllm.test_models import SHAPE

ROOT = Path(__file__).resolve().parents[2]


def run(job, tmp_path):
    job |= {"output": str(tmp_path / "found.json")}
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            f"import sys; sys.path.append({str(ROOT)!r}); from tests.vllm.ranks_script import main; main()",
        ],
        input=json.dumps(job),
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if job["ranks"] > 1 else "0", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(Path(job["output"]).read_text())


def chat(texts, n):
    """The first begins right behind the opening: its first chunk is exact, by a second cache."""
    text = "\n\n".join(texts[n + 1 :] + texts[: n + 1]) + f"\n\n{text_of(8, seed=9)}"
    return [{"role": "user", "content": ("Read this.\n\n" if n else "") + text}]


def test_two_ranks_answer_as_our_engine_and_their_blobs_serve_one(tmp_path):
    model = save_tiny(tmp_path / "model", **SHAPE)
    encoding = "previous:2+neighbours:3"
    engine = ProphetKVEngine.from_pretrained(model, config=replace(AS_IN_VLLM, encoding=encoding))
    texts, single = ([text_of(70, seed=seed) for seed in range(first, first + 4)] for first in (0, 30))
    engine.add_chunks(texts, behind=[texts[:n] for n in range(4)])
    engine.add_chunks(single)
    others = [[other for other in single if other != text] for text in single]
    engine.library.add(single, owner="engine", behind=others, as_neighbours=True)
    prompts = [chat(texts, n) for n in range(2)]
    ids = [engine.read(prompt).input_ids.tolist() for prompt in prompts]
    options = [{"recompute_ratio": 0.25}] * 2 + [{"recompute_ratio": 1.0}, {"enabled": False}]
    job = {
        "model": str(model),
        "directory": str(tmp_path / "caches"),
        "register": [engine.library.tokens.chunk(text) for text in texts],
        "prompts": [*ids, ids[0], ids[0]],
        "options": options,
        "encoding": encoding,
    }
    singles = [engine.library.tokens.chunk(text) for text in single]
    two = run(job | {"ranks": 2, "neighbours": singles}, tmp_path)
    expected = []
    for prompt, settings in zip(
        [*prompts, prompts[0], prompts[0]],
        [{"recompute_ratio": 0.25}] * 2 + [{"strategy": "full_prefill"}] * 2,
        strict=True,
    ):
        result = engine.prefill(prompt, **settings)
        output = engine.model.generate(
            **result.inputs,
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(output[0, result.input_ids.shape[1] :].tolist())
    assert two["answers"] == expected
    assert [one and one["status"] for one in two["said"]] == ["reused"] * 3 + [None]
    # Requests wait until both ranks have the caches in RAM: the first stored them, the second reads for some steps.
    ahead, in_step = zip(*((tmp_path / f"reads-{rank}.txt").read_text().split() for rank in range(2)), strict=True)
    assert in_step == ("0", "0")
    assert int(ahead[1]) > 0
    # Ranks that fail together leave a request to vLLM; one that fails alone ends it, so nobody waits for ever.
    (failed, said), (plain, nothing) = two["failed"], two["plain"]
    assert (said["status"], failed, nothing) == ("left_to_vllm", plain, None)
    assert "planted" in said["reason"]
    assert "EngineCore" in two["died"]
    store = open_disk_store(tmp_path / "caches", ram_bytes=0)
    for key, text in zip(two["neighbours"], single, strict=True):
        cache = store.find(key, fingerprint=two["fingerprint"], input_ids=None).cache
        ours = engine.store.find(engine.key_of(text), fingerprint=engine.identity.fingerprint, input_ids=None).cache
        assert [two["neighbours"].index(one) for one in cache.behind.keys] == [
            list(map(engine.key_of, single)).index(one) for one in ours.behind.keys
        ]
        for mine, other in zip((*cache.keys, *cache.values), (*ours.keys, *ours.values), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    store.close()
    # Written by two ranks, read by one: the blobs are found, and give the same answers.
    one = run(job | {"ranks": 1, "register": job["register"][:1]}, tmp_path)
    assert one["answers"] == expected
    assert [[chunk["behind"] for chunk in said["chunks"]] for said in one["said"][:2]] == [[0, 2, 2, 0], [0, 2, 0, 1]]
