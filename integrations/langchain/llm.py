"""`ProphetKVLLM`: the engine as a LangChain completion model, text in and text out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from prophetkv_rag.integrations.langchain.responses import metadata, usage
from prophetkv_rag.integrations.langchain.settings import EngineModel, cancel_on_leave
from prophetkv_rag.integrations.shared import iterate_in_thread, last_item

if TYPE_CHECKING:
    from prophetkv_rag.generation import GenerationResult, StreamChunk
    from prophetkv_rag.prompt import AnyPrompt


class ProphetKVLLM(EngineModel, BaseLLM):
    """A local completion model that reuses the KV caches of chunks in its prompt.

    For chains made for completion models; others are better off with `ChatProphetKV`. What was reused is in
    `generation_info["prophetkv"]` of every generation and, for callbacks, in `llm_output["prophetkv"]`, one report per
    prompt. See `ChatProphetKV` for everything else.
    """

    use_chat_template: bool = True
    """Send a prompt as one user message if the model has a chat template; `False` sends it as it stands."""

    @property
    def _llm_type(self) -> str:
        return "prophetkv"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, "use_chat_template": self.use_chat_template}

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        settings = self._engine_settings(stop, kwargs)
        shown = [self._prompt(prompt) for prompt in prompts]
        answers: list[GenerationResult] = self._ready_engine().generate_batch(shown, **settings)
        self._last_report = answers[-1].report if answers else self._last_report
        return self._result(answers)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        room = asyncio.Semaphore(self._ready_engine().turns.most)

        async def answer(prompt: str) -> StreamChunk:
            async with room:
                settings = self._engine_settings(stop, kwargs)  # each with an event of its own, set when it ends
                leave = cancel_on_leave(settings)
                return await last_item(self._chunks(prompt, settings), on_leave=leave)

        tasks = [asyncio.ensure_future(answer(prompt)) for prompt in prompts]
        try:
            return self._result(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # where one fails, the others are stopped
                task.cancel()

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with closing(self._chunks(prompt, self._engine_settings(stop, kwargs))) as chunks:
            for chunk in chunks:
                piece = self._piece(chunk)
                if run_manager:
                    run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        settings = self._engine_settings(stop, kwargs)
        leave = cancel_on_leave(settings)
        async with aclosing(iterate_in_thread(self._chunks(prompt, settings), on_leave=leave)) as chunks:
            async for chunk in chunks:
                piece = self._piece(chunk)
                if run_manager:
                    await run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece

    def _chunks(self, text: str, settings: dict[str, Any]) -> Generator[StreamChunk, None, None]:
        return self._run(self._prompt(text), settings)

    def _prompt(self, text: str) -> AnyPrompt:
        is_chat = self.use_chat_template and self._ready_engine().has_chat_template
        return [{"role": "user", "content": text}] if is_chat else text

    def _info(self, chunk: StreamChunk | GenerationResult) -> dict[str, Any]:
        return {**metadata(chunk, self.model_name), "usage_metadata": usage(chunk)}

    def _piece(self, chunk: StreamChunk) -> GenerationChunk:
        info = None if chunk.finish_reason is None else self._info(chunk)
        return GenerationChunk(text=chunk.delta, generation_info=info)

    def _result(self, chunks: Sequence[StreamChunk | GenerationResult]) -> LLMResult:
        prompt_tokens = sum(chunk.report.prompt_tokens for chunk in chunks)
        completion_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        return LLMResult(
            generations=[[Generation(text=chunk.text, generation_info=self._info(chunk))] for chunk in chunks],
            llm_output={
                "model_name": self.model_name,
                "token_usage": {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": completion_tokens,
                    "total_tokens": prompt_tokens + completion_tokens,
                },
                "prophetkv": [chunk.report.to_dict() for chunk in chunks],
            },
        )
