"""What the stages allocate: one layer of one prompt at a time, however many layers a model has."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch

from prophetkv_rag.integrations.vllm.pages import PagedLayer
from tests.tiny import save_tiny, text_of
from tests.vllm.serving import Served
from tests.vllm.test_models import SHAPE

CHUNKS = [text_of(200, seed=seed) for seed in range(4)]


@contextmanager
def measured(served):
    """Record what every group of requests that the stages fill has allocated at most, by torch's own allocator."""
    stages, fill = served.stages, served.stages._fill
    most: list[int] = []

    def measuring(*args):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            fill(*args)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        most.append(max(accumulate(changes)))

    stages._fill = measuring
    try:
        yield most
    finally:
        stages._fill = fill


def most_bytes(served):
    """The most that is allocated while four prompts are filled in one step; and one layer of one prompt."""
    prompts = [
        [
            {
                "role": "user",
                "content": "\n\n".join(CHUNKS[(first + n) % 4] for n in range(3)) + f"\n\n{text_of(9, seed=first)}",
            }
        ]
        for first in range(4)
    ]
    served.forget_prefixes()
    with measured(served) as most:
        served.answers(prompts, 0.1)
    assert len(most) == 1  # all in one group
    layer = (
        max(len(served.ids(prompt)) for prompt in prompts) * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 2 * 4
    )
    return most[0], layer


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Layers -> most bytes and bytes of a layer, with caches let go and, the bug, with each layer's held."""
    results = {}
    for layers in (3, 9):
        directory = tmp_path_factory.mktemp(f"layers{layers}")
        model = save_tiny(directory / "model", **SHAPE | {"num_hidden_layers": layers})
        served = Served(model, directory / "caches", max_num_batched_tokens=2048)
        try:
            served.register(CHUNKS)
            results[layers] = most_bytes(served)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PagedLayer, "_assembled", holding(PagedLayer._assembled))
                results[layers, "held"] = most_bytes(served)
        finally:
            served.close()
    return results


def holding(assembled):
    def held(self):
        self.kept = assembled(self)
        return self.kept

    return held


def test_memory_does_not_grow_with_the_number_of_layers(found):
    (few, _), (many, layer) = found[3], found[9]
    print(f"{few:,} bytes with 3 layers, {many:,} with 9; one layer of a prompt's keys and values takes {layer:,}")
    assert many < few + layer
    (few, _), (many, layer) = found[3, "held"], found[9, "held"]
    assert many > few + 5 * layer  # else this proves nothing
