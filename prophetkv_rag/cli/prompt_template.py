"""`--prompt-template FILE`: what clients' prompts look like, so that chunks are encoded as they will stand there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.errors import InputError
from prophetkv_rag.text import decode_text

PromptTemplate = str | Sequence[Mapping[str, str]]

TEMPLATE_HELP = (
    "Without a database: what clients' prompts look like, with {context} where the chunks stand: a user's message, or "
    "in a .json file chat messages (or one text, without a chat template). Chunks are encoded behind what stands "
    "before it, so that less is recomputed (docs/encodings.md)."
)


def choose_template(wanted: str | None, otherwise: PromptTemplate | None) -> PromptTemplate | None:
    """Return what a file holds, nothing for 'none', or what it is otherwise; see `read_prompt_template`."""
    if wanted is None:
        return otherwise
    return None if wanted == "none" else read_prompt_template(Path(wanted))


def read_prompt_template(file: Path | None) -> PromptTemplate | None:
    """Return `ProphetKVConfig.prompt_template`.

    Raises:
        InputError: If the file cannot be read, or has no `{context}`.
    """
    if file is None:
        return None
    try:
        text = decode_text(file.read_bytes())
        template: PromptTemplate = json.loads(text) if file.suffix == ".json" else [{"role": "user", "content": text}]
        ProphetKVConfig(prompt_template=template)
    except (OSError, ValueError, TypeError, InputError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        msg = f"--prompt-template: {file} cannot be used: {reason}"
        raise InputError(msg) from error
    return template
