"""The quality grid: tasks x strategies x ratios, each prompt against full prefill of the same token ids.

Begin reading with `grid.py` (the loop), `engines.py` (what the arms run on) and `fidelity.py` (one prefill against full
prefill); `results.py` keeps rows from run to run, `metrics.py` holds the official scores, `tables.py` and `plots.py`
show them, `calibration.py` makes a profile of them, and `choice.py` does all of it on a collection's own chunks.
"""

from prophetkv_rag.evaluation.quality.calibration import calibrate
from prophetkv_rag.evaluation.quality.choice import QUESTIONS, Choice, TooLittleTimeError, choose, measure_collection
from prophetkv_rag.evaluation.quality.engines import PAPER, Engines
from prophetkv_rag.evaluation.quality.fidelity import Arm, arms_of, forced_logits, full_prefill
from prophetkv_rag.evaluation.quality.grid import run_grid
from prophetkv_rag.evaluation.quality.intervals import bootstrap_mean
from prophetkv_rag.evaluation.quality.metrics import try_metrics
from prophetkv_rag.evaluation.quality.picks import picks_of
from prophetkv_rag.evaluation.quality.plots import plot_against_budget, plot_picks, plot_tasks
from prophetkv_rag.evaluation.quality.results import FULL, ResultsFile
from prophetkv_rag.evaluation.quality.tables import HEADER, POOLED, markdown, summarise, table_rows

__all__ = [
    "FULL",
    "HEADER",
    "PAPER",
    "POOLED",
    "QUESTIONS",
    "Arm",
    "Choice",
    "Engines",
    "ResultsFile",
    "TooLittleTimeError",
    "arms_of",
    "bootstrap_mean",
    "calibrate",
    "choose",
    "forced_logits",
    "full_prefill",
    "markdown",
    "measure_collection",
    "picks_of",
    "plot_against_budget",
    "plot_picks",
    "plot_tasks",
    "run_grid",
    "summarise",
    "table_rows",
    "try_metrics",
]
