"""Whether a model may be used: asked of the model itself, once, when it is loaded.

In comes a causal language model; out comes what was found out about each layer (`ModelSupport`), or
`UnsupportedModelError` with the layer and the reason. Begin reading with `probe.py`, which asks in order: `rotation.py`
(how a layer rotates its keys), `window.py` (whom it sees), `checks.py` (whether our passes reproduce its own forward).
"""

from prophetkv_rag.model.probe.probe import probe_model
from prophetkv_rag.model.probe.rotation import find_rotation

__all__ = ["find_rotation", "probe_model"]
