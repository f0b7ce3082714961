"""From a filled cache to text: a decode loop that anybody may stop.

In come a cache, the last token's logits and settings; out come pieces of an answer, the last with the reason why it
ended. Begin reading with `decode.py`; `interrupt.py` is how a call is stopped from outside.
"""

from prophetkv_rag.generation.decode import (
    FinishReason,
    GenerationResult,
    SamplingSettings,
    StreamChunk,
    decode_tokens,
    end_token_ids,
    stopped_before_prefill,
)
from prophetkv_rag.generation.interrupt import Interrupted, InterruptibleLock

__all__ = [
    "FinishReason",
    "GenerationResult",
    "Interrupted",
    "InterruptibleLock",
    "SamplingSettings",
    "StreamChunk",
    "decode_tokens",
    "end_token_ids",
    "stopped_before_prefill",
]
