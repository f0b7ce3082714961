"""Time to first token against full prefill and against other ways, what limits it, memory, kernels.

Begin reading with `ttft.py`; `peers.py` and `llama_cpp.py` are the other ways, `cache_reuse.py` is what one of them
does to answers, `flops.py` counts what could be at best, `results.py` and `growth.py` sum up.
"""

from prophetkv_rag.evaluation.speed.cache_reuse import measure_cache_reuse
from prophetkv_rag.evaluation.speed.gguf_export import format_of, why_not_gguf, write_gguf
from prophetkv_rag.evaluation.speed.growth import cost_per_token
from prophetkv_rag.evaluation.speed.index_speed import measure_index_throughput
from prophetkv_rag.evaluation.speed.kernel_bench import count_lines, has_device, measure_kernels
from prophetkv_rag.evaluation.speed.kernel_works import Shape
from prophetkv_rag.evaluation.speed.llama_cpp import GgufModel, check_gguf, why_not_llama_cpp
from prophetkv_rag.evaluation.speed.memory import peak_memory_bytes
from prophetkv_rag.evaluation.speed.plots import plot_ttft
from prophetkv_rag.evaluation.speed.ttft import corpus_prompt, measure_ttft

__all__ = [
    "GgufModel",
    "Shape",
    "check_gguf",
    "corpus_prompt",
    "cost_per_token",
    "count_lines",
    "format_of",
    "has_device",
    "measure_cache_reuse",
    "measure_index_throughput",
    "measure_kernels",
    "measure_ttft",
    "peak_memory_bytes",
    "plot_ttft",
    "why_not_gguf",
    "why_not_llama_cpp",
    "write_gguf",
]
