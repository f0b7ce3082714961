"""GGUF files: the one of a folder, and what transformers' own reading of a file's tokenizer leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prophetkv_rag.errors import UnknownModelError


def gguf_in(folder: Path) -> Path | None:
    """Return the `.gguf` file of a folder that holds no model in transformers' format; `None` if there is none.

    Raises:
        UnknownModelError: If there are several.
    """
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    names = sorted(path.name for path in folder.glob("*.gguf"))
    return folder / one_gguf(names, str(folder)) if names else None


def one_gguf(names: Iterable[str], where: str, wanted: str = "") -> str:
    """Return the one name of a `.gguf` file that has `wanted` (in any case) in it.

    Raises:
        UnknownModelError: If there is none, or more than one.
    """
    names = list(names)
    found = [name for name in names if wanted.lower() in name.lower()]
    if len(found) != 1:
        of_it = f" with {wanted!r} in their names" if wanted else ""
        msg = f"{where} holds {len(found)} .gguf files{of_it}; name one of them: {', '.join(found or names) or 'none'}"
        raise UnknownModelError(msg)
    return found[0]


def repair_tokenizer(tokenizer: Any, path: Path) -> None:
    """Put back how the tokenizer of a `.gguf` file splits text first, where that is known to get lost."""
    import gguf

    field = gguf.GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        split_digits_first(tokenizer)


def split_digits_first(tokenizer: Any) -> None:
    """Let a byte-level tokenizer split every digit before anything else, as SmolLM's do."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
