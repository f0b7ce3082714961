"""A model whose words are given and whose work is real: agents need answers that a tiny model cannot write."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr

from prophetkv_rag.integrations.llama_index import ProphetKVLLM
from prophetkv_rag.prompt.prompt import Prompt
from tests.integrations.taught import CALL

ANSWER = "The museum opens at ten."
USE_TOOL = 'Thought: I need to look this up.\nAction: town\nAction Input: {"input": "When does the museum open?"}'
DONE = f"Thought: I can answer without using any more tools. I'll use the user's language to answer\nAnswer: {ANSWER}"
SUB_QUESTIONS = (
    '```json\n{"items": [{"sub_question": "When does the museum open?", "tool_name": "town"}, '
    '{"sub_question": "When does the library open?", "tool_name": "town"}]}\n```'
)


def town_script(prompt: str, last: str) -> str:
    """What a good model would say to LlamaIndex's own prompts; `last` is the last message."""
    if "<|im_start|>system\nTools:" in prompt:  # the template's, where it shows tools
        is_told = "<|im_start|>tool\n" in prompt
        return ANSWER if is_told else CALL % ("town", '{"input": "When does the museum open?"}')
    if last.startswith("Observation:"):
        return DONE
    if "Thought: The current language of the user is" in prompt:
        return USE_TOOL
    if "Some choices are given below" in prompt:
        second = ', {"choice": 2, "reason": "Perhaps."}' if "no more than" in prompt else ""
        return f'[{{"choice": 1, "reason": "It is about the town."}}{second}]'
    if '"sub_question"' in prompt:
        return SUB_QUESTIONS
    if "Here's a JSON schema" in prompt:
        return '{"place": "museum", "opens_at": "ten"}'
    if "A list of documents is shown below" in prompt:
        return "Doc: 2, Relevance: 9\nDoc: 1, Relevance: 7"
    if "generates multiple search queries" in prompt:
        return "museum hours\nlibrary hours"
    return ANSWER


class ScriptedLLM(ProphetKVLLM):
    """The engine prefills every prompt and decodes one token; then the script says what the answer is.

    So prompts, chunks, reports and events are those of the real model; only the words are not its own.
    """

    _script: Any = PrivateAttr(default=None)

    def __init__(self, engine: Any = None, script: Callable[[str, str], str] = town_script, **fields: Any) -> None:
        super().__init__(engine=engine, **fields)
        self._script = script

    def _words(self, prompt: Any) -> str:
        if isinstance(prompt, Prompt):
            return self._script(str(prompt.suffix), str(prompt.suffix))
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        return self._script("\n".join(texts), texts[-1])

    def _generate(self, prompt: Any, kwargs: dict[str, Any]) -> Any:
        return replace(super()._generate(prompt, {**kwargs, "max_new_tokens": 1}), text=self._words(prompt))

    def _stream(self, prompt: Any, kwargs: dict[str, Any], cancel: Any = None) -> Generator[Any, None, None]:
        real = super()._stream(prompt, {**kwargs, "max_new_tokens": 1}, cancel)

        def scripted() -> Generator[Any, None, None]:
            with closing(real):
                for chunk in real:
                    if chunk.finish_reason is not None:
                        words = self._words(prompt)
                        yield replace(chunk, delta=words, text=words)

        return scripted()
