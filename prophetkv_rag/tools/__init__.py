"""Tools: shown by the model's own chat template, called in the form that it writes calls in.

In come chat messages, tools in OpenAI's form and a choice; out come the prompt, the grammar that holds the answer to
it, and the answer taken apart while it comes in. Begin reading with `run.py`; `formats.py` finds out how a template
writes calls, `grammar.py` turns that and the tools into a grammar, `reading.py` reads answers, `checks.py` says what
may be asked for, `response_format.py` which JSON. It knows no framework.
"""

from prophetkv_rag.tools.checks import check_choice, check_tools
from prophetkv_rag.tools.formats import find_tool_format
from prophetkv_rag.tools.reading import CallDelta, ToolCall
from prophetkv_rag.tools.response_format import response_schema
from prophetkv_rag.tools.run import ToolRun

__all__ = [
    "CallDelta",
    "ToolCall",
    "ToolRun",
    "check_choice",
    "check_tools",
    "find_tool_format",
    "response_schema",
]
