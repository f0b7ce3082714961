"""Tensor parallel: two processes, each with some of the heads; blobs hold all of them and serve any number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from prophetkv_rag import ProphetKVEngine
from tests.tiny import text_of, tiny_llama, tiny_tokenizer
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


def test_two_ranks_answer_as_our_engine_and_their_blobs_serve_one(tmp_path):
    model = tmp_path / "model"
    tiny_llama(**SHAPE).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    engine = ProphetKVEngine.from_pretrained(model, config=AS_IN_VLLM)
    texts = [text_of(70, seed=seed) for seed in range(4)]
    engine.add_chunks(texts)
    prompts = [
        [
            {
                "role": "user",
                "content": "Read this.\n\n" + "\n\n".join(texts[n:] + texts[:n]) + f"\n\n{text_of(8, seed=9)}",
            }
        ]
        for n in range(2)
    ]
    ids = [engine.read(prompt).input_ids.tolist() for prompt in prompts]
    options = [{"recompute_ratio": 0.25}] * 2 + [{"recompute_ratio": 1.0}, {"enabled": False}]
    job = {
        "model": str(model),
        "directory": str(tmp_path / "caches"),
        "register": [engine.library.tokens.chunk(text) for text in texts],
        "prompts": [*ids, ids[0], ids[0]],
        "options": options,
    }
    two = run(job | {"ranks": 2}, tmp_path)
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
    # Written by two ranks, read by one: the blobs are found, and give the same answers.
    one = run(job | {"ranks": 1, "register": job["register"][:1]}, tmp_path)
    assert one["answers"] == expected
    assert [len(said["chunks"]) for said in one["said"][:2]] == [4, 4]
