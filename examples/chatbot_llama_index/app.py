"""Chat with a folder of documents in the browser: `python examples/chatbot_llama_index/app.py [FOLDER]`.

Needs `pip install "prophetkv-rag[llama-index,app]"`. Without a folder it talks about the shipped speeches. Everything
runs on this machine: the model, the embeddings, Chroma, and the page, which loads nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: threads that wait do not spin

sys.path.insert(0, str(Path(__file__).parent))  # which Python does by itself, but not with PYTHONSAFEPATH

from prophetkv_rag.errors import MissingExtraError
from prophetkv_rag.extras import needs

try:
    with needs("app", "fastapi", "uvicorn", "python_multipart", what="the chat"):
        import python_multipart  # noqa: F401  # FastAPI takes uploads only with it
        import uvicorn
        from web import Service, make_app
except MissingExtraError as error:
    sys.exit(f"chatbot: error: {error}")

from prophetkv_rag.text import well_formed


def start(service: Service, folder: Path | None, directory: Path | None, model: str | None, tools: bool) -> None:
    """Load the model and index the folder, telling the page how far it is."""
    try:
        with ExitStack() as stack:
            _start(service, folder, directory, model, tools, stack)
    except Exception as error:
        logging.exception("the chat could not start")
        service.problem = well_formed(f"The chat could not start: {error}")


def _start(
    service: Service, folder: Path | None, directory: Path | None, model: str | None, tools: bool, stack: ExitStack
) -> None:
    def tell(phase: str) -> None:
        service.phase = phase
        say(f"  {phase}")

    with needs("llama-index", "llama_index.core", what="the chat"):
        from conversation import Conversations
        from knowledge import Knowledge

    from prophetkv_rag.defaults import (
        cache_directory,
        fetch_default_model,
        fetch_embedding_model,
        read_questions,
        speeches_directory,
    )

    if folder is None:
        folder = stack.enter_context(speeches_directory())
        service.suggestions = [question.question for question in read_questions()[:3]]
    if directory is None:
        directory = cache_directory() / "chatbot" / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]
    tell("Looking for the models")
    fetch_embedding_model(tell)
    path = model or fetch_default_model(tell)
    tell("Loading the model")
    knowledge = Knowledge(path, directory)
    service.notes = knowledge.add_folder(folder, tell)
    service.conversations = Conversations(knowledge, tools=tools)
    service.knowledge = knowledge
    tell("Ready")


def say(line: str) -> None:
    """Print a line, in whatever encoding the terminal or the file behind a redirect has."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def main() -> int:
    """Read the command line and serve until interrupted; returns the exit status, 130 after Ctrl+C."""
    service = Service()
    try:
        serve(service)
    except KeyboardInterrupt:  # uvicorn raises it again once it has shut down
        say("  stopped")
        return 130
    finally:
        if service.knowledge is not None:
            service.knowledge.close()
    return 0


def serve(service: Service) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="folder with .txt, .md or .pdf files; default: speeches")
    parser.add_argument("--port", type=int, default=8765, help="0 for any free one")
    parser.add_argument("--db", type=Path, help="where Chroma and the KV caches are kept; default: the user's cache")
    parser.add_argument("--model", help="directory or hub name; default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--tools", action="store_true", help="let the model search by itself; for one whose chat template shows tools"
    )
    arguments = parser.parse_args()
    if arguments.folder is not None and not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is not a directory; name one with .txt, .md or .pdf files")
    threading.Thread(
        target=start,
        args=(service, arguments.folder, arguments.db, arguments.model, arguments.tools),
        daemon=True,
        name="start",
    ).start()
    server = uvicorn.Server(
        uvicorn.Config(make_app(service), host="127.0.0.1", port=arguments.port, log_level="warning")
    )
    with server.config.bind_socket() as socket:
        socket.listen()  # whoever opens the address at once waits instead of being refused
        say(f"Open http://127.0.0.1:{socket.getsockname()[1]}/ in a browser; Ctrl+C ends it.")
        server.run(sockets=[socket])


if __name__ == "__main__":
    sys.exit(main())
