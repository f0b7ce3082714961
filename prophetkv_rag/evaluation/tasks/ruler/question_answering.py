"""Questions about documents (qa_1: SQuAD, qa_2: HotpotQA), among other documents of the same file."""

from __future__ import annotations

from itertools import cycle, islice

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.ruler.haystack import lines_to_pieces
from prophetkv_rag.evaluation.tasks.ruler.qa_sources import (
    DocumentQuestion,
    all_documents,
    read_hotpot,
    read_squad,
)
from prophetkv_rag.evaluation.tasks.ruler.settings import TaskSettings

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
BEFORE = f"{INSTRUCTION}\n\nThe following are given documents.\n\n"
AFTER = f"\n\n{INSTRUCTION}\n\nQuestion: "


class DocumentQA:
    """Questions in file order; a size counts documents, never fewer than the question's own."""

    min_size = 10
    max_size: int | None = None

    def __init__(self, settings: TaskSettings, questions: list[DocumentQuestion]) -> None:
        self.settings = settings
        self.num_available: int | None = len(questions)
        self._questions = questions
        self._documents = all_documents(questions)

    def build(self, index: int, size: int) -> TaskExample:
        """Return question `index` among `size` documents: its own, related ones, random ones; then all of them again.

        The order is shuffled by the seed alone, so the place of the question's own documents depends on the size only.
        """
        row = self._questions[index]
        rng = self.settings.rng(index)
        related = list(row.related)
        rng.shuffle(related)
        known = {*row.own, *related}
        others = [document for document in self._documents if document not in known]
        rng.shuffle(others)
        documents = list(islice(cycle([*row.own, *related, *others]), max(size, len(row.own))))
        self.settings.shuffle(documents)
        numbered = [f"Document {number}:\n{document}" for number, document in enumerate(documents, start=1)]
        return TaskExample(
            task=self.settings.task,
            example_id=self.settings.example_id(index),
            before=BEFORE,
            context=lines_to_pieces(numbered, "\n\n"),
            after=AFTER + row.question,
            query=row.question,
            answer_prefix=" Answer:",
            references=row.answers,
            metric="string_match_part",
            max_new_tokens=32,
        )


def squad_task(settings: TaskSettings) -> DocumentQA:
    """Return qa_1."""
    path = settings.sources.squad_path
    if path is None:
        msg = f"{settings.task} needs squad_path: SQuAD 2.0 dev in its official format (dev-v2.0.json, or .json.gz)"
        raise InputError(msg)
    return DocumentQA(settings, read_squad(path))


def hotpot_task(settings: TaskSettings) -> DocumentQA:
    """Return qa_2."""
    path = settings.sources.hotpot_path
    if path is None:
        msg = (
            f"{settings.task} needs hotpot_path: HotpotQA dev, distractor setting (hotpot_dev_distractor_v1.json), or "
            "JSON lines with the fields question, answers and passages[{title, text}]; either may be gzipped"
        )
        raise InputError(msg)
    return DocumentQA(settings, read_hotpot(path))
