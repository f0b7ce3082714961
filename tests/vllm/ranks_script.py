"""Run by test_ranks.py in a process of its own: two ranks, each with one of the model's two key/value heads."""

from __future__ import annotations

import json
import sys

from vllm import LLM, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from prophetkv_rag.integrations.vllm.identity import open_identity
from prophetkv_rag.integrations.vllm.settings import ConnectorSettings
from tests.vllm.failing import ON_ALL, ON_ONE
from tests.vllm.serving import ANSWER, transfer_config


def main() -> None:
    job = json.loads(sys.stdin.read())
    extra = {"encoding": job["encoding"], "read_ahead_s": 60.0}
    transfer = transfer_config(job["directory"], **extra)
    if job["ranks"] > 1:
        transfer |= {"kv_connector": "SlowConnector", "kv_connector_module_path": "tests.vllm.slow_reads"}
    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        block_size=32,
        tensor_parallel_size=job["ranks"],
        kv_transfer_config=transfer,
    )

    def ask(prompts, options, max_tokens=ANSWER):
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                extra_args={"kv_transfer_params": {"prophetkv": one}},
            )
            for one in options
        ]
        return llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)

    (registered,) = ask([[1]], [{"register": job["register"], "in_order": True}], 1)
    outputs = ask(job["prompts"], job["options"])
    found = {
        "fingerprint": open_identity(
            llm.llm_engine.vllm_config, ConnectorSettings(directory=job["directory"], **extra)
        ).fingerprint,
        "registered": registered.kv_transfer_params["prophetkv"],
        "answers": [list(one.outputs[0].token_ids) for one in outputs],
        "said": [(one.kv_transfer_params or {}).get("prophetkv") for one in outputs],
    }
    if "neighbours" in job:  # each behind all others
        (output,) = ask([[1]], [{"register": job["neighbours"]}], 1)
        found["neighbours"] = output.kv_transfer_params["prophetkv"]["registered"]
        behind = [[one for one in found["neighbours"] if one != key] for key in found["neighbours"]]
        ask([[1]], [{"register": job["neighbours"], "behind": behind, "as_neighbours": True}], 1)
    if job["ranks"] > 1:
        failing = [{"recompute_ratio": ON_ALL}, {"enabled": False}]
        for name, options in zip(("failed", "plain"), failing, strict=True):
            (output,) = ask(job["prompts"][:1], [options])
            found[name] = [list(output.outputs[0].token_ids), (output.kv_transfer_params or {}).get("prophetkv")]
        try:
            ask(job["prompts"][:1], [{"recompute_ratio": ON_ONE}])
        except EngineDeadError as error:
            found["died"] = str(error)
    with open(job["output"], "w") as file:
        json.dump(found, file)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
