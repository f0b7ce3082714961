"""Quality tasks: where prompts come from.

Out come `TaskExample`s (what stands before, the context, what stands after): RULER's 13 tasks, LongBench v1, questions
with passages, files of one's own. Begin reading with `example.py` and `loading.py`;
`collection.py` makes questions from a collection's own chunks, `corpus.py` says which chunks stand before and near
which. Importing this package loads no torch: samples are made without a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prophetkv_rag.lazy import lazily

if TYPE_CHECKING:
    from prophetkv_rag.evaluation.tasks.collection import read_plain_questions
    from prophetkv_rag.evaluation.tasks.corpus import corpora_of
    from prophetkv_rag.evaluation.tasks.example import TaskExample
    from prophetkv_rag.evaluation.tasks.loading import (
        check_names,
        check_sources,
        load_examples,
        metric_names,
        task_names,
    )
    from prophetkv_rag.evaluation.tasks.own_data import QUESTION_TEMPLATE
    from prophetkv_rag.evaluation.tasks.prompting import task_prompt, user_turn
    from prophetkv_rag.evaluation.tasks.ruler import Sources

_HOME = {
    "QUESTION_TEMPLATE": "prophetkv_rag.evaluation.tasks.own_data",
    "Sources": "prophetkv_rag.evaluation.tasks.ruler",
    "TaskExample": "prophetkv_rag.evaluation.tasks.example",
    "check_names": "prophetkv_rag.evaluation.tasks.loading",
    "corpora_of": "prophetkv_rag.evaluation.tasks.corpus",
    "read_plain_questions": "prophetkv_rag.evaluation.tasks.collection",
    "user_turn": "prophetkv_rag.evaluation.tasks.prompting",
    "check_sources": "prophetkv_rag.evaluation.tasks.loading",
    "load_examples": "prophetkv_rag.evaluation.tasks.loading",
    "metric_names": "prophetkv_rag.evaluation.tasks.loading",
    "task_names": "prophetkv_rag.evaluation.tasks.loading",
    "task_prompt": "prophetkv_rag.evaluation.tasks.prompting",
}

__all__ = [
    "QUESTION_TEMPLATE",
    "Sources",
    "TaskExample",
    "check_names",
    "check_sources",
    "corpora_of",
    "load_examples",
    "metric_names",
    "read_plain_questions",
    "task_names",
    "task_prompt",
    "user_turn",
]

__getattr__, __dir__ = lazily(__name__, _HOME)
