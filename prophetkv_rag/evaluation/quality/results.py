"""The rows of a quality grid, and the file that keeps them from run to run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.quality.fidelity import Arm
from prophetkv_rag.evaluation.tasks.example import TaskExample

FULL = "full_prefill"


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One example, one arm; full prefill has a row of its own (`strategy` `"full_prefill"`, `kl` 0).

    `charged_ratio` is the budget really spent (`ReuseReport.charged_ratio`); `score` is the task's official metric on
    the arm's greedy answer. `inputs` are hex digits of all text that went in, which rows kept from another run must
    share; "" in rows that do not tell.
    """

    task: str
    example_id: str
    strategy: str
    recompute_ratio: float
    charged_ratio: float
    kl: float
    top1_agreement: float
    attended_recall: float | None
    score: float
    prompt_tokens: int
    chunk_tokens: int
    recomputed_tokens: int
    ttft_s: float
    answer: str
    inputs: str = ""


class ResultsFile:
    """A JSON-lines file of rows behind one line that says under which conditions they were measured.

    An example's rows are appended together, in one write, when all its arms are done: an interrupted run loses the
    example under way and nothing else.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        """Open or start the file.

        Raises:
            InputError: If it exists and holds rows measured under other conditions, is not such a file, or cannot be
                written.
        """
        self.path = path
        self.rows: list[QualityRow] = []
        try:
            self._open(path, conditions)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            msg = f"{path} cannot be used for results: {reason}; give another file"
            raise InputError(msg) from error

    def _open(self, path: Path, conditions: dict[str, Any]) -> None:
        if path.exists() and path.stat().st_size:
            before, self.rows = read_results(path)
            changed = sorted(key for key in {*before, *conditions} if before.get(key) != conditions.get(key))
            if changed:
                msg = (
                    f"{path} was measured under other conditions ({', '.join(changed)}); give another --out, or the "
                    "options it was made with"
                )
                raise InputError(msg)
            _drop_torn_line(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"conditions": conditions}) + "\n", encoding="utf-8")

    def missing(self, example: TaskExample, arms: Mapping[Arm, str]) -> list[Arm]:
        """Return the arms that have no row of this example yet.

        Args:
            example: The example.
            arms: With `Engines.inputs_of` of each.

        Raises:
            InputError: If a row was measured on other text.
        """
        done = {
            Arm(row.strategy, row.recompute_ratio): row.inputs
            for row in self.rows
            if (row.task, row.example_id) == (example.task, example.example_id)
        }
        for arm, inputs in arms.items():
            if done.get(arm, "") not in ("", inputs):
                msg = (
                    f"{self.path} holds {arm.label} of {example.task}, example {example.example_id}, measured on other "
                    "text (a data file or source text has changed, or the lead-in); give another --out"
                )
                raise InputError(msg)
        return [arm for arm in arms if arm not in done]

    def append(self, rows: Sequence[QualityRow]) -> None:
        """Add rows; full prefill's only once per example."""
        known = {(row.task, row.example_id) for row in self.rows if row.strategy == FULL}
        rows = [row for row in rows if row.strategy != FULL or (row.task, row.example_id) not in known]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
            file.flush()
        self.rows.extend(rows)


def read_results(path: Path) -> tuple[dict[str, Any], list[QualityRow]]:
    """Read a results file; a last line that was cut off is left out.

    Raises:
        InputError: If it is not a results file.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        conditions = json.loads(lines[0])["conditions"]
        rows = [QualityRow(**json.loads(line)) for line in lines[1:-1] if line]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path} is not a results file of `bench quality` ({type(error).__name__}: {error}); give another --out"
        raise InputError(msg) from error
    return conditions, rows


def _drop_torn_line(path: Path) -> None:
    """Remove a last row that was cut off; a header without its end of line gets it."""
    data = path.read_bytes()
    if b"\n" not in data:
        path.write_bytes(data + b"\n")
    elif not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
