"""From text to token ids, and where the chunks lie among them.

In comes a prompt as applications make it: a string, chat messages, or a `Prompt` of segments; out comes a
`PromptLayout`: every token's id, the spans that come from chunk caches, and the tokens that ask. Begin reading with
`prompt.py`, `layout.py` and `reader.py`, which goes from one to the other; `question.py` finds who asks,
`chunk_index.py` finds chunk texts verbatim (by `rolling_hash.py`) and `token_index.py` chunks in token ids; `tokens.py`
is the tokenizer as we use it, on `codec.py`, which does for any tokenizer what `tokenizer_probe.py` found missing in
it. Chat messages of any origin become plain ones (`chat_messages.py`), fitted to the model's template
(`chat_template.py`).
"""

from prophetkv_rag.prompt.chat_messages import content_text, plain_messages
from prophetkv_rag.prompt.chunk_index import ChunkIndex, text_entry
from prophetkv_rag.prompt.layout import ChunkSpan, MovedSpan, PromptLayout
from prophetkv_rag.prompt.prompt import AnyPrompt, Prompt
from prophetkv_rag.prompt.question import question_of
from prophetkv_rag.prompt.reader import PromptReader, shared_length
from prophetkv_rag.prompt.token_index import TokenIndex, TokenMatch
from prophetkv_rag.prompt.tokenizer_probe import probe_chat
from prophetkv_rag.prompt.tokens import Tokens

__all__ = [
    "AnyPrompt",
    "ChunkIndex",
    "ChunkSpan",
    "MovedSpan",
    "Prompt",
    "PromptLayout",
    "PromptReader",
    "TokenIndex",
    "TokenMatch",
    "Tokens",
    "content_text",
    "plain_messages",
    "probe_chat",
    "question_of",
    "shared_length",
    "text_entry",
]
