"""The template-level calls of an LLM, which know the question before it is flattened into the prompt.

Response synthesizers call `predict`, `stream`, `apredict` or `astream` with a template and its variables. Here the
question (`query_str`) is still apart from the context, so it is handed to the model as `query=`: ProphetKV scores the
cached tokens by it. Otherwise these methods do what `LLM`'s own do, and the structured ones leave everything else to
them. Nothing is kept between calls: the question travels as an argument, so threads, tasks and interleaved streams
cannot see each other's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

from llama_index.core.instrumentation.events.llm import LLMPredictEndEvent, LLMPredictStartEvent
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.llm import (
    astream_chat_response_to_tokens,
    astream_completion_response_to_tokens,
    dispatcher,
    stream_chat_response_to_tokens,
    stream_completion_response_to_tokens,
)
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import TokenAsyncGen, TokenGen

from prophetkv_rag.generation import Grammar
from prophetkv_rag.integrations.llama_index.refusal import refusing


def query_kwargs(prompt: BasePromptTemplate, prompt_args: dict[str, Any]) -> dict[str, str]:
    """Return `{"query": question}` if the template's variables hold the question, else `{}`."""
    query = {**prompt.kwargs, **prompt_args}.get("query_str")
    return {"query": query} if isinstance(query, str) and query.strip() else {}


def join_context(prompt_args: dict[str, Any]) -> dict[str, Any]:
    """Return the variables with a `context_str` that is text.

    `simple_summarize` passes a list of texts, which the template would print as Python source, escaped line breaks
    and all: unreadable for the model, and no chunk in it could be recognised (llama_index issue 22392).
    """
    context = prompt_args.get("context_str")
    if isinstance(context, (list, tuple)):
        return {**prompt_args, "context_str": "\n\n".join(map(str, context))}
    return prompt_args


class QueryAwareLLM(CustomLLM):
    """A `CustomLLM` whose `chat` and `complete` families also get the question, as the keyword argument `query`."""

    @dispatcher.span
    def predict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """Fill the template, run the model and return the parsed answer."""
        prompt_args = self._start_predict(prompt, prompt_args)
        extra = query_kwargs(prompt, prompt_args)
        if self.metadata.is_chat_model:
            output = self.chat(self._get_messages(prompt, **prompt_args), **extra).message.content or ""
        else:
            output = self.complete(self._get_prompt(prompt, **prompt_args), formatted=True, **extra).text
        return self._end_predict(output)

    @dispatcher.span
    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """Async twin of `predict`."""
        prompt_args = self._start_predict(prompt, prompt_args)
        extra = query_kwargs(prompt, prompt_args)
        if self.metadata.is_chat_model:
            output = (await self.achat(self._get_messages(prompt, **prompt_args), **extra)).message.content or ""
        else:
            output = (await self.acomplete(self._get_prompt(prompt, **prompt_args), formatted=True, **extra)).text
        return self._end_predict(output)

    @dispatcher.span
    def stream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenGen:
        """Fill the template and yield the answer's text piece by piece."""
        self._check_no_parser(prompt)
        prompt_args = self._start_predict(prompt, prompt_args)
        extra = query_kwargs(prompt, prompt_args)
        if self.metadata.is_chat_model:
            messages = self._get_messages(prompt, **prompt_args)
            return stream_chat_response_to_tokens(self.stream_chat(messages, **extra))
        text = self._get_prompt(prompt, **prompt_args)
        return stream_completion_response_to_tokens(self.stream_complete(text, formatted=True, **extra))

    @dispatcher.span
    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """Async twin of `stream`."""
        self._check_no_parser(prompt)
        prompt_args = self._start_predict(prompt, prompt_args)
        extra = query_kwargs(prompt, prompt_args)
        if self.metadata.is_chat_model:
            messages = self._get_messages(prompt, **prompt_args)
            return await astream_chat_response_to_tokens(await self.astream_chat(messages, **extra))
        text = self._get_prompt(prompt, **prompt_args)
        return await astream_completion_response_to_tokens(await self.astream_complete(text, formatted=True, **extra))

    def structured_predict(
        self, output_cls: Any, prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        """Fill the template, run the model and return the answer as an `output_cls`, a pydantic model.

        The answer is held to its schema, so that only one that was cut off (`max_new_tokens`) is an error.
        """
        prompt_args, llm_kwargs = _structured_args(output_cls, prompt, prompt_args, llm_kwargs)
        return super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    async def astructured_predict(
        self, output_cls: Any, prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        """Async twin of `structured_predict`."""
        prompt_args, llm_kwargs = _structured_args(output_cls, prompt, prompt_args, llm_kwargs)
        return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    def stream_structured_predict(
        self, output_cls: Any, prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Generator[Any, None, None]:
        """Yield the answer as an `output_cls`, as far as it goes."""
        prompt_args, llm_kwargs = _structured_args(output_cls, prompt, prompt_args, llm_kwargs)
        return super().stream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    async def astream_structured_predict(
        self, output_cls: Any, prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> AsyncGenerator[Any, None]:
        """Async twin of `stream_structured_predict`."""
        prompt_args, llm_kwargs = _structured_args(output_cls, prompt, prompt_args, llm_kwargs)
        return await super().astream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    def _start_predict(self, prompt: BasePromptTemplate, prompt_args: dict[str, Any]) -> dict[str, Any]:
        """Send the start events and return the repaired template variables."""
        prompt_args = join_context(prompt_args)
        dispatcher.event(LLMPredictStartEvent(template=prompt, template_args=prompt_args))
        self._log_template_data(prompt, **prompt_args)
        return prompt_args

    def _end_predict(self, output: str) -> str:
        """Parse the answer and send the end event."""
        parsed = self._parse_output(output)
        dispatcher.event(LLMPredictEndEvent(output=parsed))
        return parsed

    def _check_no_parser(self, prompt: BasePromptTemplate) -> None:
        if prompt.output_parser is not None or self.output_parser is not None:
            msg = "Output parser is not supported for streaming."  # LlamaIndex's own words
            raise NotImplementedError(msg)


def _structured_args(
    output_cls: Any, prompt: BasePromptTemplate, prompt_args: dict[str, Any], llm_kwargs: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the repaired template variables, and the model's arguments with question and schema among them."""
    with refusing():
        grammar = Grammar.json_schema(output_cls.model_json_schema())
    return join_context(prompt_args), {"grammar": grammar, **query_kwargs(prompt, prompt_args), **(llm_kwargs or {})}
