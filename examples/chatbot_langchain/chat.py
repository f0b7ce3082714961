"""Chat with your own text files in a terminal: `python examples/chatbot_langchain/chat.py FOLDER`.

The index and the caches of its chunks lie in FOLDER/.prophetkv; unchanged files cost nothing at the next start.
"""

import sys
from pathlib import Path

import chromadb
from langchain_classic.indexes import SQLRecordManager, index
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_text_splitters import RecursiveCharacterTextSplitter
from rich.console import Console

from prophetkv_rag.chroma import open_store
from prophetkv_rag.defaults import fetch_default_model
from prophetkv_rag.errors import InputError
from prophetkv_rag.integrations.langchain import ChatProphetKV, MiniLMEmbeddings, ProphetKVChroma
from prophetkv_rag.text import decode_text, shown_name

PROMPT = ChatPromptTemplate.from_messages(
    [
        ("placeholder", "{history}"),
        ("human", "Context:\n\n{context}\n\nAnswer from the context, in one sentence: {question}"),
    ]
)

MOST_MESSAGES = 16


def read_folder(folder: Path, console: Console) -> list[Document]:
    """Cut every .txt and .md file below the folder into chunks; says which cannot be read."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md") and path.is_file())
    documents = []
    for path in files:
        name = shown_name(path.relative_to(folder))
        try:
            documents.append(Document(decode_text(path.read_bytes()), metadata={"source": name}))
        except (InputError, OSError) as error:
            console.print(f"{name} is left out: {error}", style="dim", markup=False)
    return RecursiveCharacterTextSplitter(chunk_size=800, chunk_overlap=0).split_documents(documents)


def main(folder: Path, model_name: str | Path) -> None:
    """Index the folder, then answer until the input ends."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a redirect on Windows has no encoding for every answer
    console = Console(highlight=False)
    home = folder / ".prophetkv"
    home.mkdir(exist_ok=True)
    client = chromadb.PersistentClient(str(home))
    model = ChatProphetKV.from_pretrained(model_name, store=open_store(client), max_tokens=200)
    store = ProphetKVChroma("chat", MiniLMEmbeddings(), client=client, engine=model.engine)
    records = SQLRecordManager(f"chat/{model.engine.identity.model}", db_url=f"sqlite:///{home}/records.db")
    records.create_schema()
    changes = index(
        read_folder(folder, console), records, store, cleanup="full", source_id_key="source", key_encoder="sha256"
    )
    console.print(f"{shown_name(folder)}: {changes}. Ask away; an empty line ends the chat.", style="dim")

    chain, history = PROMPT | model, []
    while question := console.input("[bold]> [/]").strip():
        found = store.similarity_search(question, k=4)
        context = "\n\n".join(document.page_content for document in found)
        answer = None
        if len(history) > MOST_MESSAGES:  # many at once: a prompt that begins as the last one computes only what is new
            history = history[-6:]
        for chunk in chain.stream({"context": context, "history": history, "question": question}):
            console.print(chunk.text, end="", markup=False)
            answer = chunk if answer is None else answer + chunk
        usage = answer.usage_metadata
        details = usage["input_token_details"]
        ttft = answer.response_metadata["prophetkv"]["timings_s"]["ttft"]
        sources = ", ".join(dict.fromkeys(document.metadata["source"] for document in found))
        reused = f"{details['cache_read']} of {usage['input_tokens']} prompt tokens reused"
        report = f"{sources} - {reused}, {details['remembered']} of the conversation; first token after {ttft:.2f} s"
        console.print(f"\n{report}\n", style="dim", markup=False)
        history += [HumanMessage(question), AIMessage(answer.text)]


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: chat.py FOLDER [MODEL]; FOLDER holds .txt or .md files, MODEL is a hub name or directory")
    try:
        main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else fetch_default_model())
    except (EOFError, KeyboardInterrupt):
        print()
