"""From a filled cache to text: a decode loop that anybody may stop.

In come a prefill to call and settings; out come pieces of an answer, the last with the reason why it ended. Begin
reading with `answer.py`, one answer from beginning to end; `decode.py` is its loop, `sampling.py` how a token is
chosen, `interrupt.py` how a call is stopped from outside. `turns.py` says whose turn it is to run the model and which
calls share a forward: those of `steps.py` (next tokens) and `shared_passes.py` (the stages of prompts); `batch.py`
begins several at once. `grammar.py` says what an answer must look like, and `constraint.py` holds it to that.
"""

from prophetkv_rag.generation.answer import stream_answer
from prophetkv_rag.generation.batch import AnswersPrompts
from prophetkv_rag.generation.constraint import GrammarCompiler
from prophetkv_rag.generation.decode import FinishReason, GenerationResult, StreamChunk, end_token_ids
from prophetkv_rag.generation.grammar import Grammar, json_rule, literal
from prophetkv_rag.generation.interrupt import InterruptibleLock
from prophetkv_rag.generation.sampling import SamplingSettings
from prophetkv_rag.generation.shared_passes import SharedPasses
from prophetkv_rag.generation.turns import Turns

__all__ = [
    "AnswersPrompts",
    "FinishReason",
    "GenerationResult",
    "Grammar",
    "GrammarCompiler",
    "InterruptibleLock",
    "SamplingSettings",
    "SharedPasses",
    "StreamChunk",
    "Turns",
    "end_token_ids",
    "json_rule",
    "literal",
    "stream_answer",
]
