"""vLLM with its compiled graphs, as it runs unless told otherwise: our passes leave them alone; answers are eager's."""

from __future__ import annotations

import shutil

import pytest

from tests.tiny import save_tiny
from tests.vllm.serving import Served, reuse, tokens
from tests.vllm.test_conversations import next_turn
from tests.vllm.test_encodings import DOCUMENT, prompts
from tests.vllm.test_models import SHAPE

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")


def test_answers_are_those_of_eager_vllm(tmp_path, monkeypatch):
    from vllm.config import CompilationMode

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "compiled"))
    found = []
    for is_eager in (True, False):
        directory = tmp_path / str(is_eager)
        served = Served(
            save_tiny(tmp_path / "model", **SHAPE), directory, block_size=32, enforce_eager=is_eager, max_num_seqs=4
        )
        try:
            mode = served.llm.llm_engine.vllm_config.compilation_config.mode
            assert (mode == CompilationMode.NONE) == is_eager
            served.register(DOCUMENT[:4], in_order=True)
            ids = [served.ids(one) for one in prompts()]
            outputs = served.run(ids, [{}, {"recompute_ratio": 0.25}, {"enabled": False}])
            assert [reuse(output).get("status") for output in outputs] == ["reused", "reused", None]
            turn = next_turn(served, ids[0], tokens(outputs[0]), DOCUMENT[0], "And then?")
            outputs += served.run([turn], [{}])
            assert reuse(outputs[-1])["remembered_tokens"] > 0
            found.append([tokens(output) for output in outputs])
        finally:
            served.close()
    assert found[0] == found[1]
