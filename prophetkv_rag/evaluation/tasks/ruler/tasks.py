"""The 13 tasks by name, and their samples at a given length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.ruler.fitting import largest_size, reduced_size
from prophetkv_rag.evaluation.tasks.ruler.niah import VARIANTS, Niah
from prophetkv_rag.evaluation.tasks.ruler.question_answering import hotpot_task, squad_task
from prophetkv_rag.evaluation.tasks.ruler.settings import SampleBuilder, Sources, TaskSettings, TokenCounter
from prophetkv_rag.evaluation.tasks.ruler.variable_tracking import VariableTracking
from prophetkv_rag.evaluation.tasks.ruler.word_counts import CommonWords, FrequentWords

RULER_TASKS: dict[str, Callable[[TaskSettings], SampleBuilder]] = {
    **{f"ruler_niah_{name}": partial(Niah, variant=variant) for name, variant in VARIANTS.items()},
    "ruler_vt": VariableTracking,
    "ruler_cwe": CommonWords,
    "ruler_fwe": FrequentWords,
    "ruler_qa_1": squad_task,
    "ruler_qa_2": hotpot_task,
}
"""Constructors by task name, in RULER's order."""


def generate(
    task: str,
    *,
    max_seq_length: int,
    num_samples: int,
    count_tokens: TokenCounter,
    seed: int = 42,
    sources: Sources | None = None,
) -> Iterator[TaskExample]:
    """Make the first samples of a task, each as long as fits.

    The haystack's size is the largest at which sample 0 fits; a sample that is longer there gets a smaller one. Samples
    depend on the task, the seed, the length and their index only.

    Args:
        task: A name in `RULER_TASKS`.
        max_seq_length: Tokens of the whole rendered prompt and of the longest answer together.
        num_samples: RULER takes 500, the ProphetKV paper 100.
        count_tokens: Tokens of an example's whole rendered prompt, answer prefix included.
        seed: RULER's is 42.
        sources: Files given by the user.

    Returns:
        An iterator. Settings and files are checked before it is returned, samples are made one by one.

    Raises:
        InputError: For an unknown task, a missing or malformed file, more samples than there are questions, or a length
            below the task's shortest prompt (by the iterator, if sample 0 fits).
    """
    if task not in RULER_TASKS:
        msg = f"unknown RULER task {task!r}; there are: {', '.join(RULER_TASKS)}"
        raise InputError(msg)
    if num_samples < 1:
        msg = f"num_samples must be at least 1, not {num_samples}"
        raise InputError(msg)
    settings = TaskSettings(task, max_seq_length, seed, count_tokens, sources or Sources())
    builder = RULER_TASKS[task](settings)
    if builder.num_available is not None and num_samples > builder.num_available:
        msg = f"{task}: num_samples is {num_samples}, but the file has only {builder.num_available} questions"
        raise InputError(msg)

    def fits(size: int, index: int) -> bool:
        return settings.fits(builder.build(index, size))

    if not fits(builder.min_size, 0):
        raise _too_short(settings, builder, num_samples)
    common = largest_size(partial(fits, index=0), builder.min_size, builder.max_size)

    def samples() -> Iterator[TaskExample]:
        for index in range(num_samples):
            size = reduced_size(partial(fits, index=index), builder.min_size, common)
            if size is None:
                raise _too_short(settings, builder, num_samples)
            yield builder.build(index, size)

    return samples()


def _too_short(settings: TaskSettings, builder: SampleBuilder, num_samples: int) -> InputError:
    shortest = (builder.build(index, builder.min_size) for index in range(num_samples))
    needed = max(map(settings.total_tokens, shortest))
    return InputError(
        f"{settings.task}: max_seq_length is {settings.max_seq_length}, but the smallest prompt and its answer "
        f"take {needed} tokens; give at least {needed}"
    )
