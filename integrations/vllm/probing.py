"""`prophetkv-rag doctor --engine vllm`: load a model as vLLM does, and say what the probe finds in its module."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from prophetkv_rag.errors import InputError, UnsupportedModelError
from prophetkv_rag.integrations.vllm.settings import ConnectorSettings, transfer_config
from prophetkv_rag.model import ModelSupport


def probe_in_vllm(model: str, engine_args: Mapping[str, Any]) -> tuple[ModelSupport, str]:
    """Load a model in this process and probe it; ends with it unloaded.

    Args:
        model: Path or hub name.
        engine_args: Keywords of vLLM's `LLM`.

    Returns:
        What the probe found, and the device.

    Raises:
        InputError: If vLLM takes no such keyword.
        UnsupportedModelError: With the reason, if its caches cannot be re-positioned exactly.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else what the probe finds stays in another process
    from vllm import LLM
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    with tempfile.TemporaryDirectory() as directory:
        config = transfer_config(ConnectorSettings(directory=directory))
        try:
            llm = LLM(model, **{"max_num_seqs": 2, **engine_args, "kv_transfer_config": config})
        except TypeError as error:
            msg = f"vLLM does not take these settings: {error}; see `vllm serve --help`, with _ for -"
            raise InputError(msg) from error
        stages = get_kv_transfer_group().stages
        if stages is None:
            msg = "vLLM did not hand its pages to the connector"
            raise UnsupportedModelError(msg)
        found = stages.support, str(stages.device)
        llm.llm_engine.engine_core.shutdown()
    return found
