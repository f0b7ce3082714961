"""A caller's settings of torch reach no pass, no cache, no key: what comes out is the same bit for bit."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.model import load_model
from prophetkv_rag.model.ambient import own_state
from prophetkv_rag.reuse import available_strategies
from prophetkv_rag.store.disk.store import DiskStore
from tests import families
from tests.model.ambient_states import STATES
from tests.tiny import CORPUS, save_tiny, tiny_llama, tiny_tokenizer

CHUNKS = list(CORPUS[:3])
PROMPT = Prompt("Context: ", CHUNKS, " Question: when was it built, and by whom?", glue="\n\n")
NOTHING = nullcontext


def blobs(directory: Path) -> dict[str, Any]:
    """(Header, tensors' bytes) of every blob; safetensors writes the header's entries in any order."""
    found = {}
    for path in sorted(directory.rglob("*.safetensors")):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        found[path.name] = json.loads(data[8:end]), data[end:]
    return found


class Outcome:
    """Everything that an engine's life comes to; each step runs in a state of the caller's."""

    def __init__(self, directory: Path, **states: Callable[[], Any]) -> None:
        def state(step: str) -> Any:
            return states.get(step, NOTHING)()

        model = tiny_llama()
        with state("make"):
            engine = ProphetKVEngine(model, tiny_tokenizer(), store=DiskStore(directory))
        self.engine = engine
        self.identity = engine.identity
        self.support = engine.support
        assert engine.library.prefix is not None
        self.tensors = [tensor for pair in engine.library.prefix.layers for tensor in pair]
        with state("add"):
            self.keys = engine.add_chunks(CHUNKS)
        engine.store.flush()
        self.blobs = blobs(directory)
        with state("prefill"):
            results = [engine.prefill(PROMPT), engine.prefill(PROMPT, recompute_ratio=1.0)]
            results.append(engine.prefill(PROMPT, strategy="full_prefill"))
        for result in results:
            scores = result.view().scores
            self.tensors += [
                result.logits,
                result.recomputed,
                torch.tensor([]) if scores is None else torch.tensor(scores),
            ]
            for layer in result.past_key_values.layers:
                self.tensors += [layer.keys, layer.values]
        with state("stream"):
            pieces = engine.stream(PROMPT, max_new_tokens=6, temperature=0.7, top_p=0.9, seed=3)
            self.text = next(pieces).text
        with state("step"):  # what the caller has set may change between two pieces
            self.text += "".join(piece.delta for piece in pieces)
        with state("read"):
            layout = engine.read(PROMPT)
            self.tensors.append(layout.input_ids)
        with state("remove"):
            self.deleted = engine.remove_chunks(self.keys)

    def must_equal(self, other: Outcome) -> None:
        assert self.identity == other.identity
        assert self.support == other.support
        assert self.keys == other.keys
        assert self.blobs == other.blobs
        assert len(self.blobs) == len(CHUNKS)
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.device == theirs.device
            assert not mine.requires_grad
            assert not mine.is_inference()
            assert torch.equal(mine, theirs)
        assert self.text == other.text
        assert self.deleted == other.deleted == self.keys


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("undisturbed"))


STEPS = ("make", "add", "prefill", "stream", "step", "read", "remove")


@pytest.mark.parametrize("step", [*STEPS, "all"])
@pytest.mark.parametrize("name", STATES)
def test_the_callers_state_changes_nothing(name: str, step: str, undisturbed: Outcome, tmp_path: Path) -> None:
    before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    steps = STEPS if step == "all" else (step,)
    Outcome(tmp_path, **dict.fromkeys(steps, STATES[name])).must_equal(undisturbed)
    assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before


@pytest.mark.parametrize("name", STATES)
def test_a_model_loads_the_same_in_any_state(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    expected, _ = load_model(tmp_path)
    with STATES[name]():
        found, _ = load_model(tmp_path)
    for (mine, tensor), (theirs, other) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert mine == theirs
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("name", STATES)
def test_every_strategy_chooses_the_same_in_any_state(name: str) -> None:
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer())
    engine.add_chunks(CHUNKS)
    for strategy in available_strategies():
        expected = engine.prefill(PROMPT, strategy=strategy, recompute_ratio=0.3)
        with STATES[name]():
            found = engine.prefill(PROMPT, strategy=strategy, recompute_ratio=0.3)
        assert torch.equal(found.recomputed, expected.recomputed), strategy
        assert torch.equal(found.logits, expected.logits), strategy


@pytest.mark.parametrize(
    "name", ["autocast_bf16", "default_dtype_float64", "default_dtype_bfloat16", "everything_at_once"]
)
@pytest.mark.parametrize("family", families.SUPPORTED)
def test_no_familys_own_code_sees_the_callers_state(family: str, name: str) -> None:
    config = ProphetKVConfig(encoding_prefix=(1, 5, 6))
    chunks = [[(7 * i + 3 * j) % 100 + 3 for j in range(20 + i)] for i in range(3)]
    prompt = Prompt([1, 5], chunks, [9, 8, 7])
    model = families.SUPPORTED[family]()

    def outcome() -> Any:
        engine = ProphetKVEngine(model, None, config=config)
        engine.add_chunks(chunks)
        return engine.identity, engine.prefill(prompt).logits, engine.prefill(prompt, strategy="full_prefill").logits

    expected = outcome()
    with STATES[name]():
        found = outcome()
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


@own_state()
def fails() -> None:
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_default_device().type == "cpu"
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_grad_enabled()
    msg = "of ours"
    raise RuntimeError(msg)


def test_the_callers_state_is_put_back_after_an_error() -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        with pytest.raises(RuntimeError, match="of ours"):
            fails()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_device().type == "meta"
        assert torch.is_inference_mode_enabled()


ROOT = Path(__file__).resolve().parents[2]
NEED_A_DTYPE = {"zeros", "ones", "empty", "rand", "randn", "linspace", "eye", "full"}
CORE = ["kernels", *(f"prophetkv_rag/{name}" for name in ("model", "chunks", "reuse", "generation", "prompt", "store"))]


@pytest.mark.parametrize("folder", CORE)
def test_every_tensor_is_made_with_a_dtype_by_name(folder: str) -> None:
    """The default dtype belongs to the whole process: it can neither be relied on nor be changed for a pass."""
    nameless = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in NEED_A_DTYPE
        and "dtype" not in {keyword.arg for keyword in node.keywords}
    ]
    assert nameless == []
