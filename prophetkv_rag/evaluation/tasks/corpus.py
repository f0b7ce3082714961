"""Which chunks stand before a chunk in its document and near it in its task: what arms encode it behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prophetkv_rag.config import Encoding
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.prompting import task_prompt

Embed = Callable[[list[str]], Any]
"""Texts -> `[texts, dimensions]`, of length 1."""


@dataclass(slots=True)
class Corpus:
    """The chunks of a task, in documents.

    Attributes:
        documents: The chunks of each document, in order, without white space around them.
        is_kept: Whether caches are kept from example to example, because these share chunks.
    """

    documents: tuple[tuple[str, ...], ...]
    is_kept: bool = False
    _nearest: dict[str, list[str]] | None = None

    @property
    def chunks(self) -> list[str]:
        """All chunks, each once."""
        return list(dict.fromkeys(chunk for document in self.documents for chunk in document))

    def behind(self, chunks: Iterable[str], encoding: Encoding, embed: Embed) -> dict[str, list[str]]:
        """Return what each of these chunks stands behind, and each chunk that is needed for it, in an order to encode.

        Args:
            chunks: Texts of chunks; one that the corpus does not hold stands behind nothing.
            encoding: Which other chunks.
            embed: Called at most once, for neighbours.
        """
        wanted = [chunk.strip() for chunk in chunks]
        found: dict[str, list[str]] = {chunk: [] for chunk in wanted}
        if encoding.kind == "previous":
            found = self._previous(wanted, encoding.count)
        return {chunk: before or self._neighbours(chunk, encoding, embed) for chunk, before in found.items()}

    def _neighbours(self, chunk: str, encoding: Encoding, embed: Embed) -> list[str]:
        is_first_of_several = any(chunk == one[0] and len(one) > 1 for one in self.documents)
        if not encoding.num_neighbours or (encoding.kind == "previous" and is_first_of_several):
            return []
        if self._nearest is None:
            self._nearest = _nearest(self.chunks, embed)
        return self._nearest.get(chunk, [])[: encoding.num_neighbours][::-1]

    def _previous(self, wanted: Sequence[str], count: int) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for chunk in wanted:
            document = next((one for one in self.documents if chunk in one), (chunk,))
            # A chain: the cache of the chunk before says what stands before that one.
            for number in range(document.index(chunk) + 1):
                found.setdefault(document[number], list(document[max(0, number - count) : number]))
        return found


def corpora_of(examples: Sequence[TaskExample], tokenizer: Any, chunk_tokens: int) -> dict[str, Corpus]:
    """Return each task's corpus: a context is a document, or, in a question file, every chunk of one is."""
    documents: dict[str, list[tuple[str, ...]]] = {}
    for example in examples:
        chunks = [str(chunk).strip() for chunk in task_prompt(example, tokenizer, chunk_tokens).chunks]
        chunks = [chunk for chunk in chunks if chunk]
        documents.setdefault(example.task, []).extend(
            [tuple(chunks)] if example.is_document else [(chunk,) for chunk in chunks]
        )
    return {task: Corpus(tuple(of_task)) for task, of_task in documents.items()}


_MOST_NEIGHBOURS = 16


def _nearest(chunks: list[str], embed: Embed) -> dict[str, list[str]]:
    """The other chunks, the nearest first."""
    import numpy as np

    vectors = np.asarray(embed(chunks), dtype=np.float32)
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -np.inf)
    order = np.argsort(-likeness, axis=1, kind="stable")[:, : min(_MOST_NEIGHBOURS, len(chunks) - 1)]
    return {chunk: [chunks[one] for one in row] for chunk, row in zip(chunks, order.tolist(), strict=True)}
