"""How vLLM's kernels lay pages out is found by asking them: in any layout, rows come back as they were written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from prophetkv_rag.integrations.vllm.page_reader import PageReader, page_readers

BLOCKS, ROWS, HEADS, SIZE = 5, 8, 2, 6


def layer_of(shape, write, dtype=torch.float32):
    impl = SimpleNamespace(do_kv_cache_update=lambda layer, k, v, pages, slots: write(pages, k, v, slots))
    return SimpleNamespace(
        impl=impl, kv_cache=torch.zeros(shape, dtype=dtype), num_kv_heads=HEADS, head_size=SIZE, head_size_v=SIZE
    )


def keys_before_values(pages, keys, values, slots):
    pages[0].view(-1, HEADS, SIZE)[slots] = keys
    pages[1].view(-1, HEADS, SIZE)[slots] = values


def heads_outside(pages, keys, values, slots):
    pages[slots // ROWS, :, slots % ROWS, :SIZE] = keys
    pages[slots // ROWS, :, slots % ROWS, SIZE:] = values


def packed(pages, keys, values, slots):
    """Pairs of rows side by side, as a kernel for bf16 has keys; values backwards; unused room at the end."""
    for key, value, slot in zip(keys, values, slots.tolist(), strict=True):
        block, row = pages[slot // ROWS], slot % ROWS
        block[: ROWS * HEADS * SIZE].view(ROWS // 2, HEADS * SIZE, 2)[row // 2, :, row % 2] = key.flatten()
        block[ROWS * HEADS * SIZE : -3].view(ROWS, -1)[row] = value.flatten().flip(0)


LAYOUTS = {
    "keys before values": ((2, BLOCKS, ROWS, HEADS, SIZE), keys_before_values),
    "heads outside": ((BLOCKS, HEADS, ROWS, 2 * SIZE), heads_outside),
    "packed": ((BLOCKS, 2 * ROWS * HEADS * SIZE + 3), packed),
    "half blocks": ((2, 2 * BLOCKS, ROWS // 2, HEADS, SIZE), keys_before_values),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_rows_come_back(layout, dtype):
    layer = layer_of(*LAYOUTS[layout], dtype=dtype)
    (reader,) = page_readers([layer], BLOCKS, ROWS)
    assert not layer.kv_cache.any()  # as it was
    keys, values = torch.randn(2, 20, HEADS, SIZE).to(dtype)
    slots = torch.randperm(BLOCKS * ROWS)[:20]
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
    read_keys, read_values = reader.read(layer, slots)
    torch.testing.assert_close(read_keys, keys.transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(read_values, values.transpose(0, 1), rtol=0, atol=0)


def lossy(pages, keys, values, slots):
    keys_before_values(pages, keys.round(), values, slots)


def scattered(pages, keys, values, slots):
    """The blocks are not laid out alike."""
    keys_before_values(pages, torch.where((slots >= ROWS)[:, None, None], keys.flip(-1), keys), values, slots)


@pytest.mark.parametrize("write", [lossy, scattered])
def test_what_is_not_understood_is_not_read(write):
    shape = (2, BLOCKS, ROWS, HEADS, SIZE)
    assert PageReader.of(layer_of(shape, write), BLOCKS, ROWS) is None
    assert page_readers([layer_of(shape, write)], BLOCKS, ROWS) is None
