"""One row of a quality task, before it is tokenised."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TaskExample:
    """A prompt in parts, with what is needed to mark its answer.

    The prompt is `before + context + after` inside one user turn (or as plain text, where `chat` is false), then
    `answer_prefix` inside the opened assistant turn. Only the context is cacheable.

    Attributes:
        task: Name of the task, such as `ruler_vt`.
        example_id: Unique within the task, stable across runs.
        before: Text between the start of the user turn and the context.
        context: The context's pieces, in order; their concatenation is the context. Pieces are the task's natural
            units (a document with its separator, say); the harness joins or cuts them to chunks of a given size.
        after: Text after the context: question and instructions.
        query: The question alone, a substring of `after` where possible, or `None`.
        answer_prefix: Opens the assistant's answer.
        references: Accepted (or, for some metrics, required) answers.
        metric: Name of the official metric, a key of `metrics.METRICS`.
        max_new_tokens: The task's official limit on the answer.
        chat: Whether the chat template is used.
        all_classes: The classes of a classification task.
        stop_at_newline: Whether generation stops at the first newline (SAMSum).
        is_document: Whether the context is one document; else each of its chunks is one.
        glue: Text between chunks where the pieces are chunks already, which are neither joined nor cut; else `None`.
    """

    task: str
    example_id: str
    before: str
    context: tuple[str, ...]
    after: str
    query: str | None
    answer_prefix: str
    references: tuple[str, ...]
    metric: str
    max_new_tokens: int
    chat: bool = True
    all_classes: tuple[str, ...] = ()
    stop_at_newline: bool = False
    is_document: bool = True
    glue: str | None = None
