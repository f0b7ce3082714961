"""A user's own questions as a quality task: passages in LlamaIndex's default prompt, answers marked by F1."""

from __future__ import annotations

from pathlib import Path

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.questions import Question, read_questions

OWN_DATA_TASK = "own_data"
QUESTION_TEMPLATE = (
    "Context information is below.\n---------------------\n{context}\n---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\nQuery: {question}\nAnswer: "
)
"""LlamaIndex's default text QA template."""

SEPARATOR = "\n\n"
MAX_NEW_TOKENS = 32


def load_questions(path: Path, limit: int | None = None) -> list[TaskExample]:
    """Read `{id, question, answers[], passages[{title, text}]}` rows from a `.jsonl` or `.jsonl.gz` file.

    Args:
        path: The file.
        limit: Stop after this many rows.

    Returns:
        One example a row; its context's pieces are the passages, each with the separator behind it.

    Raises:
        InputError: If the file is missing, a row lacks a field (the message names the line) or has no passage or no
            answer, or two rows share an id.
    """
    examples: dict[str, TaskExample] = {}
    for question in read_questions(path, limit=limit):
        if question.id in examples:
            msg = f"{path}: the id {question.id!r} is there twice; results are kept by id, so make the ids unique"
            raise InputError(msg)
        if not any(text.strip() for text in question.passages) or not question.answers:
            empty = "answers" if any(text.strip() for text in question.passages) else "passages"
            msg = f"{path}: {empty} of the question {question.id!r} is empty; give at least one"
            raise InputError(msg)
        examples[question.id] = _example(question)
    return list(examples.values())


def _example(question: Question) -> TaskExample:
    before, _, rest = QUESTION_TEMPLATE.partition("{context}")
    last = len(question.passages) - 1
    pieces = (text if i == last else text + SEPARATOR for i, text in enumerate(question.passages))
    return TaskExample(
        task=OWN_DATA_TASK,
        example_id=question.id,
        before=before,
        context=tuple(pieces),
        after=rest.format(question=question.question),
        query=question.question,
        answer_prefix="",
        references=question.answers,
        metric="qa_f1",
        max_new_tokens=MAX_NEW_TOKENS,
        is_document=False,
    )
