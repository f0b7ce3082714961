"""Quality tasks: where prompts come from, and how answers are marked.

Out come `TaskExample`s (what stands before, the context, what stands after): RULER's 13 tasks, LongBench v1, questions
with passages, files of one's own. Begin reading with `example.py` and `loading.py`.
"""

from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.loading import check_names, load_examples, task_names
from prophetkv_rag.evaluation.tasks.prompting import task_prompt
from prophetkv_rag.evaluation.tasks.ruler import Sources

__all__ = ["Sources", "TaskExample", "check_names", "load_examples", "task_names", "task_prompt"]
