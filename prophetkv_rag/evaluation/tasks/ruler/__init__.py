"""RULER (Hsieh et al. 2024, arXiv 2404.06654): its 13 synthetic tasks, written from their definitions.

Definitions and template texts are those of NVIDIA/RULER at c3f5e3b (Apache-2.0); the code is our own, and so are the
random draws: rows have RULER's format and distribution, not RULER's numbers. What differs on purpose:

- The essay haystack is public-domain speeches (the shipped demo corpus) instead of Paul Graham's essays, which may not
  be redistributed; `Sources.essay_path` takes any text. Sentences end by a rule (see `haystack`), not by NLTK's model,
  and two needles at one place are joined by one space, where RULER leaves two.
- The chat template is around the whole prompt only; RULER's cwe also repeats it inside the few-shot example.
- Sizes are exact: the largest that fits sample 0, then per sample the largest that fits below it. RULER takes steps
  (25 lines, 500 words, 10 documents) and loops for ever where its smallest prompt is too long; here that is an error.
  Below RULER's smallest prompt there are 5 lines, 50 words or 20 words (cwe), so short lengths work too.
- cwe ends at the 8,166 words of wonderwords (198k tokens by SmolLM2's tokenizer, fewer where digits share a token):
  beyond that RULER changes to another word list, and here the prompt stays shorter than it may be.
- Keys, values and names within a prompt are distinct, so that every question has one answer; RULER leaves that to
  chance. fwe has at least 74 draws: from there on the last answer is more frequent than the next word.
- Samples are drawn from (task, seed, index) alone: the same needles at every length, and a sample does not change with
  the number of samples.
"""

from prophetkv_rag.evaluation.tasks.ruler.settings import Sources, TaskSettings
from prophetkv_rag.evaluation.tasks.ruler.tasks import RULER_TASKS, generate

__all__ = ["RULER_TASKS", "Sources", "TaskSettings", "generate"]
