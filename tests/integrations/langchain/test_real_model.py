"""A retrieval chain on the real default models, which `make model` fetches beforehand."""

from __future__ import annotations

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.prompts import ChatPromptTemplate
from langchain_text_splitters import RecursiveCharacterTextSplitter

from prophetkv_rag.defaults import fetch_default_model, read_speeches
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain import ChatProphetKV, MiniLMEmbeddings, ProphetKVChroma

pytestmark = pytest.mark.model

PROMPT = ChatPromptTemplate.from_messages([("system", "Answer from the context.\n\n{context}"), ("human", "{input}")])
QUESTION = "What was the day of the attack on Pearl Harbor?"


@pytest.fixture(scope="module")
def model() -> ChatProphetKV:
    return ChatProphetKV.from_pretrained(fetch_default_model(), max_tokens=12, remember=False)


def test_a_chain_at_ratio_one_answers_as_the_model_itself(model: ChatProphetKV) -> None:
    speech = read_speeches()["1942-roosevelt.txt"]
    texts = RecursiveCharacterTextSplitter(chunk_size=500, chunk_overlap=0).split_text(speech)[:5]
    store = ProphetKVChroma.from_texts(texts, MiniLMEmbeddings(), collection_name="lc-real", engine=model.engine)
    answers = {}
    for ratio in (1.0, 0.2):
        exact = model.model_copy(update={"recompute_ratio": ratio})
        documents = create_stuff_documents_chain(exact, PROMPT)
        result = create_retrieval_chain(store.as_retriever(search_kwargs={"k": 3}), documents).invoke(
            {"input": QUESTION}
        )
        answers[ratio] = result["answer"]
        report = exact.last_report
        assert [chunk.status for chunk in report.chunks] == ["hit"] * 3
    assert report.reused_tokens / report.chunk_tokens == pytest.approx(0.8, abs=0.01)
    engine, context = model.engine, "\n\n".join(document.page_content for document in result["context"])
    prompt = engine.read(messages(context))
    own = engine.model.generate(prompt.input_ids[None], max_new_tokens=12, do_sample=False)[0, prompt.num_tokens :]
    assert engine.tokenizer.decode(own, skip_special_tokens=True) == answers[1.0] != ""
    store.delete_collection()


def messages(context: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": f"Answer from the context.\n\n{context}"},
        {"role": "user", "content": QUESTION},
    ]


def test_the_default_models_template_shows_no_tools(model: ChatProphetKV) -> None:
    assert not model.supports_tools
    with pytest.raises(InputError, match="leaves tools out"):
        model.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}])
