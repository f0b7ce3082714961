"""What a model's forward calls its cache: asked of the model, else of the installed transformers, and nowhere else."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.model import CACHE_NAME, cache_argument
from tests import families

ROOT = Path(__file__).resolve().parents[2]
CACHE = object()


def older(input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


def newer(input_ids: Any, cache: Any = None, **kwargs: Any) -> None: ...


def both(input_ids: Any, past_key_values: Any = None, cache: Any = None) -> None: ...


def neither(*args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("forward", "name"), [(older, "past_key_values"), (newer, "cache"), (both, "cache"), (neither, CACHE_NAME)]
)
def test_the_model_is_asked_first(forward: Callable[..., None], name: str) -> None:
    """A checkpoint's own code may be older than the transformers it runs in; a wrapper names nothing."""
    assert cache_argument(SimpleNamespace(forward=forward), CACHE) == {name: CACHE}
    assert cache_argument(forward, CACHE) == {name: CACHE}


def test_the_installed_transformers_name_is_the_one_its_generate_takes() -> None:
    assert CACHE_NAME in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters


@pytest.mark.parametrize("name", families.SUPPORTED)
def test_nothing_on_the_way_to_an_answer_is_deprecated(name: str) -> None:
    """Probe, encode, prefill, decode, and transformers' own `generate` on what comes out."""
    chunks = [[(7 * i + 3 * j) % 90 + 3 for j in range(12)] for i in range(2)]
    prompt = Prompt([1, 5], chunks, [9, 8, 7])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine = ProphetKVEngine(families.SUPPORTED[name](), None, config=ProphetKVConfig(encoding_prefix=(1, 5, 6)))
        engine.add_chunks(chunks)
        for strategy in ("prophetkv", "full_prefill"):
            result = engine.prefill(prompt, strategy=strategy)
            more = engine.model.generate(**result.inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
            assert torch.equal(more[:, : result.input_ids.shape[1]], result.input_ids)
    assert [str(one.message) for one in said if "deprecated" in str(one.message)] == []


def test_no_other_place_spells_it_out() -> None:
    """Transformers 5.40 takes no `past_key_values=`; `cache_argument` and `result.inputs` stay right."""
    found = []
    for folder in ("prophetkv_rag", "integrations", "kernels", "examples", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and any(one.arg == "past_key_values" for one in node.keywords):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
