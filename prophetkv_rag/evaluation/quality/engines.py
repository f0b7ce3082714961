"""The engines of a grid: one as it is configured, and one for each task and encoding; all run one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.engine import ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.quality.fidelity import Arm
from prophetkv_rag.evaluation.tasks.corpus import Corpus, Embed
from prophetkv_rag.evaluation.tasks.surroundings import Surroundings
from prophetkv_rag.profile import parse_behind
from prophetkv_rag.prompt import Prompt

_KEPT = "quality corpus"


PAPER = ProphetKVConfig(encoding="plain", first_chunk="cached", recompute_ratio=0.2)
"""The paper's recipe (arXiv 2602.02579), which arms depart from by their options and by what stands behind `@`."""


class Engines:
    """What arms run on."""

    def __init__(
        self,
        default: ProphetKVEngine,
        surroundings: Mapping[str, Surroundings] | None = None,
        corpora: Mapping[str, Corpus] | None = None,
        *,
        embed: Embed | None = None,
    ) -> None:
        """Start from an engine that encodes chunks behind the chat template's opening.

        Args:
            default: That engine.
            surroundings: Per task, what chunks stand behind in arms that say `prompt` or `corpus`.
            corpora: Per task, where arms find the other chunks that a chunk stands behind.
            embed: What neighbours are found with; the shipped embedder by default.
        """
        self.default = default
        self.surroundings = surroundings or {}
        self.corpora = corpora or {}
        self._embed = embed or _shipped_embedder
        self._others: dict[tuple[str, str], ProphetKVEngine] = {}

    def of(self, arm: Arm, task: str) -> ProphetKVEngine:
        """Return the engine that holds an arm's caches.

        Raises:
            InputError: If the arm has an encoding and the task no example to spare for it.
        """
        if not arm.encoding:
            return self.default
        around = self._around(arm, task)
        if (task, arm.encoding) not in self._others:
            has_opening, has_lead_in, encoding = parse_behind(arm.encoding)
            config = replace(
                self.default.config,
                prompt_template=f"{around.opening}{{context}}" if around and has_opening else None,
                lead_in=around.lead_in if around and has_lead_in else None,
                encoding=str(encoding),
            )
            engine = ProphetKVEngine(self.default.model, self.default.tokenizer, config=config)
            if (corpus := self.corpora.get(task)) is not None and corpus.is_kept:
                self._add(engine, corpus, corpus.chunks, _KEPT)
            self._others[task, arm.encoding] = engine
        return self._others[task, arm.encoding]

    def add_chunks(self, arms: Sequence[Arm], task: str, chunks: Sequence[str], *, owner: str) -> Callable[[], None]:
        """Encode an example's chunks for each of the arms; returns what lets go of them."""
        used = {id(engine): engine for engine in (self.of(arm, task) for arm in arms)}.values()
        keys = [(engine, self._add(engine, self.corpora.get(task), chunks, owner)) for engine in used]

        def forget() -> None:
            for engine, own in keys:
                engine.remove_chunks(own, owner=owner)

        return forget

    def inputs_of(self, arm: Arm, task: str, prompt: Prompt) -> str:
        """Return hex digits of all text that an arm's row comes from: the prompt, and what its chunks stand behind."""
        texts: list[Any] = [prompt.prefix, *prompt.chunks, prompt.suffix]
        if arm.encoding:
            around = self._around(arm, task)
            has_opening, has_lead_in, encoding = parse_behind(arm.encoding)
            texts += [has_opening and around and around.opening, has_lead_in and around and around.lead_in]
            if encoding.kind != "plain" and task in self.corpora:
                texts.append(self.corpora[task].behind(map(str, prompt.chunks), encoding, self._embed))
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]

    def _add(self, engine: ProphetKVEngine, corpus: Corpus | None, chunks: Sequence[str], owner: str) -> list[str]:
        encoding = engine.library.encoding
        if corpus is None or encoding.kind == "plain":
            return engine.add_chunks(chunks, owner=owner)
        behind = corpus.behind(chunks, encoding, self._embed)
        if not encoding.num_neighbours:
            return engine.add_chunks(list(behind), behind=list(behind.values()), owner=owner)
        # As in a collection: each alone, or behind what stands before it, first.
        chained = corpus.behind(chunks, replace(encoding, otherwise=0), self._embed)
        before = chained if encoding.kind == "previous" else {}
        known = dict.fromkeys([*behind, *(text for texts in behind.values() for text in texts)])
        keys = engine.add_chunks(list(known), behind=[before.get(text, ()) for text in known], owner=owner)
        near = {text: texts for text, texts in behind.items() if not before.get(text)}
        return keys + engine.library.add(list(near), behind=list(near.values()), owner=owner, as_neighbours=True)

    def _around(self, arm: Arm, task: str) -> Surroundings | None:
        has_opening, has_lead_in, _ = parse_behind(arm.encoding)
        if not has_opening and not has_lead_in:
            return None
        if task not in self.surroundings:
            msg = f"{arm.strategy}: task {task!r} has no example to spare for {arm.encoding!r}; give fewer --rows"
            raise InputError(msg)
        around = self.surroundings[task]
        if has_lead_in and around.lead_in is None:
            msg = (
                f"{arm.strategy}: the example that task {task!r} has to spare holds no passage that no other has, so "
                "there is no lead-in; end a data file with a question whose passages are its own, give RULER a longer "
                "source text, or leave the strategy out"
            )
            raise InputError(msg)
        return around


def _shipped_embedder(texts: list[str]) -> Any:
    from prophetkv_rag.defaults import MiniLMEmbedder

    return MiniLMEmbedder().embed(texts)
