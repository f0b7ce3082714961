"""The seam to transformers: one model, proven at load, and forward passes over any of its rows.

In comes a causal language model; out goes what the probe found out about it (`ModelSupport`) and passes that run its
own forward with our attention, over caches that take rows in place. No model class is patched or named. Begin reading
with `attention.py` (how a layer's call reaches us), then `cache_layers.py` (where its rows go), `encode_pass.py`,
`rows_pass.py`, `norm_pass.py` and `sparse_pass.py` (what is done with them), `forward.py` (how a pass is run:
`ambient.py` and `uncompiled.py` keep away what the caller has set and compiled, `state.py` notices what he changes),
`runner.py` (what a pass needs of whoever runs the model), `packed_pass.py` (several prompts' passes in one forward,
`step_pass.py` for an answer's next tokens) and `probe/` (why a model may be trusted with all that).
"""

from prophetkv_rag.model.ambient import own_state
from prophetkv_rag.model.attention import AttentionCall, AttentionPass, model_lock
from prophetkv_rag.model.cache_argument import CACHE_NAME, cache_argument
from prophetkv_rag.model.cache_layers import RowsLayer, cache_of, complete_cache, resumable_cache
from prophetkv_rag.model.devices import device_of, dtype_of
from prophetkv_rag.model.encode_pass import EncodeBehindPass, EncodePass
from prophetkv_rag.model.fingerprint import model_fingerprint, tokenizer_fingerprint
from prophetkv_rag.model.forward import backbone, decoder_layers, plain_forward, run_pass
from prophetkv_rag.model.gguf_files import one_gguf, split_digits_first
from prophetkv_rag.model.loading import load_model
from prophetkv_rag.model.norm_pass import NormScoringPass
from prophetkv_rag.model.packed_pass import run_packed
from prophetkv_rag.model.probe import find_rotation, probe_model
from prophetkv_rag.model.rope import RopeTables, Rotation
from prophetkv_rag.model.rows_pass import RowsPass, ScoringPass
from prophetkv_rag.model.runner import PassJob, Runner, TransformersRunner
from prophetkv_rag.model.sparse_pass import SparsePass
from prophetkv_rag.model.state import ModelState
from prophetkv_rag.model.step_pass import StepPass
from prophetkv_rag.model.support import LayerSupport, ModelSupport

__all__ = [
    "CACHE_NAME",
    "AttentionCall",
    "AttentionPass",
    "EncodeBehindPass",
    "EncodePass",
    "LayerSupport",
    "ModelState",
    "ModelSupport",
    "NormScoringPass",
    "PassJob",
    "RopeTables",
    "Rotation",
    "RowsLayer",
    "RowsPass",
    "Runner",
    "ScoringPass",
    "SparsePass",
    "StepPass",
    "TransformersRunner",
    "backbone",
    "cache_argument",
    "cache_of",
    "complete_cache",
    "decoder_layers",
    "device_of",
    "dtype_of",
    "find_rotation",
    "load_model",
    "model_fingerprint",
    "model_lock",
    "one_gguf",
    "own_state",
    "plain_forward",
    "probe_model",
    "resumable_cache",
    "run_packed",
    "run_pass",
    "split_digits_first",
    "tokenizer_fingerprint",
]
