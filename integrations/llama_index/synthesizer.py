"""`ProphetKVSynthesizer`: answers from nodes that the caller holds, whether they are indexed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.llms.llm import astream_completion_response_to_tokens, stream_completion_response_to_tokens
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index.core.types import RESPONSE_TEXT_TYPE

from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.llama_index.llm import ProphetKVLLM
from prophetkv_rag.prompt import Prompt

dispatcher = get_dispatcher(__name__)

_CONTEXT = "\u2063context\u2063"
_BETWEEN = "\n\n"  # what LlamaIndex puts between two nodes


class ProphetKVSynthesizer(BaseSynthesizer):
    """Puts all nodes into one prompt and tells the engine where each of them stands.

    Query engines need nothing of this: chunks indexed through `ProphetKVChromaVectorStore` are found in any prompt. It
    is for callers who hold nodes from elsewhere: `synthesizer.synthesize(question, nodes)`, or
    `index.as_query_engine(response_synthesizer=synthesizer)`. The prompt is the one of `response_mode="compact"`, and
    every node is a chunk, also one that no store knows (its cache is computed for this prompt, and kept only if
    something refers to it) or that is too short to be found by its text.

    There is one call of the model, so all nodes must fit its window; nothing is left out or refined.

    Args:
        llm: The model.
        text_qa_template: Prompt with `{context_str}` and `{query_str}`; LlamaIndex's default.
        streaming: Whether `synthesize` returns a streaming response.
        **fields: Other arguments of `BaseSynthesizer`, such as `callback_manager`.

    Raises:
        CallRefusedError: From `synthesize`, if the prompt is too long.
    """

    def __init__(
        self,
        llm: ProphetKVLLM,
        *,
        text_qa_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        **fields: Any,
    ) -> None:
        if not isinstance(llm, ProphetKVLLM):
            msg = f"ProphetKVSynthesizer got {type(llm).__name__} as its llm; give a ProphetKVLLM"
            raise InputError(msg)
        super().__init__(llm=llm, streaming=streaming, **fields)
        self._text_qa_template = text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)

    @dispatcher.span
    def synthesize(self, query: Any, nodes: list[NodeWithScore], *args: Any, **kwargs: Any) -> RESPONSE_TYPE:
        """Answer a question from these nodes."""
        return super().synthesize(query, nodes, *args, **{**kwargs, "parts_of_nodes": _parts(nodes)})

    @dispatcher.span
    async def asynthesize(self, query: Any, nodes: list[NodeWithScore], *args: Any, **kwargs: Any) -> RESPONSE_TYPE:
        """Async twin of `synthesize`."""
        return await super().asynthesize(query, nodes, *args, **{**kwargs, "parts_of_nodes": _parts(nodes)})

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answer from texts, each of which is a chunk."""
        text, options = self._call(query_str, text_chunks, response_kwargs)
        if self._streaming:
            return stream_completion_response_to_tokens(self._llm.stream_complete(text, **options))
        return self._llm.complete(text, **options).text

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Async twin of `get_response`."""
        text, options = self._call(query_str, text_chunks, response_kwargs)
        if self._streaming:
            return await astream_completion_response_to_tokens(await self._llm.astream_complete(text, **options))
        return (await self._llm.acomplete(text, **options)).text

    def _call(
        self, query_str: str, text_chunks: Sequence[str], response_kwargs: dict[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Return the prompt as text, for events and logs, and the arguments of the model's call."""
        parts = response_kwargs.pop("parts_of_nodes", None) or [("", text.strip()) for text in text_chunks]
        parts = [(lead, text) for lead, text in parts if text]
        rendered = self._llm.render(
            self._text_qa_template, context_str=_CONTEXT, query_str=query_str, **response_kwargs
        )
        before, found, after = rendered.partition(_CONTEXT)
        if not found:
            msg = "the text_qa_template has no {context_str}; the nodes would have no place in it"
            raise InputError(msg)
        leads = [(_BETWEEN if number else "") + lead for number, (lead, _) in enumerate(parts)]
        chunks = [text for _, text in parts]
        if leads:
            before, leads[0] = before + leads[0], ""
        prompt = Prompt(before, chunks, after, query=query_str, leads=leads)
        text = before + "".join(lead + chunk for lead, chunk in zip(leads, chunks, strict=True)) + after
        return text, {"formatted": True, "parts": prompt, "query": query_str}


def _parts(nodes: Sequence[NodeWithScore]) -> list[tuple[str, str]]:
    """Split each node as the model sees it into its header (metadata) and its own text, the chunk."""
    parts = []
    for item in nodes:
        seen = item.node.get_content(metadata_mode=MetadataMode.LLM).strip()
        text = item.node.get_content(metadata_mode=MetadataMode.NONE).strip()
        at = seen.rfind(text) if text else -1
        # A text template may put words behind the text, or alter it: then what the model sees is the chunk.
        is_header = at >= 0 and at + len(text) == len(seen)
        parts.append((seen[:at], text) if is_header else ("", seen))
    return parts
