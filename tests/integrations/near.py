"""What the tests of neighbours share: texts in two groups, an engine that encodes behind neighbours, brute force."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.engine import ProphetKVEngine
from tests.integrations.conftest import MODEL
from tests.integrations.langchain.rag import HashingEmbeddings
from tests.integrations.rag import TEXTS, chunk_key
from tests.tiny import tiny_tokenizer

NEAR_TEXTS = (
    *TEXTS,
    "The museum and the library open at ten o'clock on every day but Monday, the library beside the river too.",
    "The old harbour of Marsala and its boats are watched from the river bank by people who never sleep at all.",
)
BESIDE = "The museum beside the library opens at ten o'clock on Monday, nine o'clock every other day."


def near_engine(encoding: str = "neighbours:2") -> ProphetKVEngine:
    return ProphetKVEngine(MODEL, tiny_tokenizer(), config=ProphetKVConfig(encoding=encoding, remember=False))


def before(engine: ProphetKVEngine, text: str, texts: Sequence[str]) -> list[str]:
    """The texts that a chunk is encoded behind."""
    by_key = {chunk_key(engine, one): one for one in texts}
    return [by_key[key] for key in engine.store.behind(chunk_key(engine, text)).keys]


def nearest(text: str, texts: Sequence[str], count: int = 2) -> list[str]:
    """The same by brute force, the nearest last."""
    vectors = {one: np.array(HashingEmbeddings().embed_query(one)) for one in texts}
    others = sorted((one for one in texts if one != text), key=lambda one: vectors[one] @ vectors[text])
    return others[-count:]
