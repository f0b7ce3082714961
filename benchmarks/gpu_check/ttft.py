"""Time to first token with random weights in the shape of Llama-3.1-8B, bf16: full prefill against reuse, by kernels.

One JSON object a line: context tokens, what ran, seconds (the best of three), and how far the first token's logits are
from full prefill's at ratio 1.0.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prophetkv_rag import Prompt, ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.kernels import ops

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY = LLAMA_8B | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 480,
}
CHUNK = 512


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short contexts, for a dry run on a CPU")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(LlamaConfig(**(TINY if args.tiny else LLAMA_8B))).eval()
        torch.set_default_dtype(torch.float32)
    engine = ProphetKVEngine(model, None, config=ProphetKVConfig(encoding_prefix=tuple(range(1, 9))))
    say(conditions=str(torch.cuda.get_device_name()) if device == "cuda" else device, torch=torch.__version__)
    for context in (1024, 2048) if args.tiny else (4096, 8192, 16384):
        measure(engine, context)


def measure(engine: ProphetKVEngine, context: int) -> None:
    """Measure one length."""
    draw = torch.Generator().manual_seed(context)
    vocabulary = engine.model.config.vocab_size

    def ids(count: int) -> list[int]:
        return torch.randint(10, vocabulary, (count,), generator=draw).tolist()

    chunks = [ids(CHUNK) for _ in range(context // CHUNK)]
    engine.add_chunks(chunks)
    prompt = Prompt(list(range(1, 9)), chunks, ids(32))
    full, expected = timed(engine, prompt, strategy="full_prefill")
    say(context=context, arm="full prefill", seconds=full)
    kernels = ("triton", "reference") if engine.model.device.type == "cuda" else ("reference",)
    for kernel in kernels:
        with ops.force(kernel):
            for ratio, share in ((0.2, 1.0), (0.2, 0.3), (0.1, 1.0), (0.0, 1.0), (1.0, 1.0)):
                seconds, logits = timed(
                    engine, prompt, strategy=f"prophetkv:context_share={share}", recompute_ratio=ratio
                )
                more = {"logits_off_by": float((logits - expected).abs().max())} if ratio == 1.0 else {}
                arm = {"kernels": kernel, "recompute_ratio": ratio, "context_share": share}
                say(context=context, **arm, seconds=seconds, times_sooner=full / seconds, **more)


def timed(engine: ProphetKVEngine, prompt: Prompt, **settings: Any) -> tuple[float, torch.Tensor]:
    """Return the best of three, after one that compiles, and the logits."""
    times, logits = [], None
    for _ in range(4):
        started = time.perf_counter()
        logits = engine.prefill(prompt, **settings).logits
        float(logits[0, 0])  # waits for the device
        times.append(time.perf_counter() - started)
    assert logits is not None
    return min(times[1:]), logits


def say(**row: Any) -> None:
    """Print a row."""
    print(json.dumps(row), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
