"""Former prompts and their answers, kept so that a prompt which begins as one of them computes only what is new.

In come the rows of finished answers; out come those that a new prompt begins with, with what is known of each: exact,
computed or stale. Begin reading with `rows.py` (what these words mean, and what is said of a prompt's rows), then
`tier.py`, the tier as the engine uses it, on `tree.py`, where rows are shared by their token ids; `insertion.py` and
`room.py` are what comes in and what goes. `moving.py` finds messages that stand elsewhere now, `saving.py` and
`file.py` keep it all over a restart.
"""

from prophetkv_rag.conversations.moving import SHORTEST, MovedRows
from prophetkv_rag.conversations.rows import AnsweredRows, KeysBefore, RowState, Trace, states_after
from prophetkv_rag.conversations.saving import SavesConversations
from prophetkv_rag.conversations.tier import ConversationTier
from prophetkv_rag.conversations.tree import HeldRows

__all__ = [
    "SHORTEST",
    "AnsweredRows",
    "ConversationTier",
    "HeldRows",
    "KeysBefore",
    "MovedRows",
    "RowState",
    "SavesConversations",
    "Trace",
    "states_after",
]
