"""vLLM, unmodified: a KV connector that fills requests from the caches of chunks found in their token ids.

In come vLLM's requests; out go pages filled by stage I and stage II, run on vLLM's own module. Begin reading with
`connector.py`, which vLLM loads; `served_engine.py` is vLLM as our own server and `index` use it (`running.py`,
`served_chunks.py`, `sampling.py`, `reports.py`, `tenants.py`), `probing.py` what `doctor` asks. In the scheduler's
process `planner.py` decides (`lookup.py` finds chunks, `known.py` and `plans.py` say what a request costs, `turns.py`
which former prompt it goes on from, `written.py` whether that can be read yet, `registration.py` what is to be encoded,
`awaited.py` who waits for what is read, `identity.py` whose caches they are, `settings.py` what may be said);
`messages.py` goes to the workers and back. There `workers.py` runs the stages and `encoding.py` encodes, on `runner.py`
(the module), `pages.py` (where rows go) and `page_reader.py` (how they are read back), `rank_caches.py` and `heads.py`
(which part of which cache is this rank's), `rank_reads.py` (what is read before it is needed). `support.py` refuses
what cannot be served.
"""

from prophetkv_rag.extras import needs

with needs("vllm", "vllm", what="prophetkv_rag.integrations.vllm"):
    from prophetkv_rag.integrations.vllm.connector import ProphetKVConnector
    from prophetkv_rag.integrations.vllm.probing import probe_in_vllm
    from prophetkv_rag.integrations.vllm.served_engine import VLLMEngine
    from prophetkv_rag.integrations.vllm.settings import ConnectorSettings

__all__ = ["ConnectorSettings", "ProphetKVConnector", "VLLMEngine", "probe_in_vllm"]
