"""What `--kv-transfer-config` may say to our connector, and what a client may say about one request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prophetkv_rag.config import (
    Encoding,
    FirstChunk,
    ProphetKVConfig,
    check_first_chunk,
    check_recompute_ratio,
    parse_encoding,
)
from prophetkv_rag.errors import InputError
from prophetkv_rag.store import is_key
from prophetkv_rag.store.blobs import check_format
from prophetkv_rag.store.disk import DiskStore, must_be_unlocked, open_disk_store

NAME = "prophetkv"
"""Our part of a request's and of an answer's `kv_transfer_params`."""

_LEAST = {"min_chunk_tokens": 1, "max_stage_tokens": 1, "ram_bytes": 0, "max_bytes": 1, "namespace_max_bytes": 1}
MAX_QUESTION_IDS = 1024
MAX_REGISTERED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorSettings:
    """`kv_connector_extra_config`.

    Attributes:
        directory: Where chunk caches are kept; the same for all of vLLM's processes, on all of its machines.
        recompute_ratio: Share of the chunk tokens that is recomputed, where a request does not say; `None` as in
            `ProphetKVConfig`: by how the chunks were encoded.
        context_share: See `ProphetKVConfig`.
        encoding: See `ProphetKVConfig`. Neighbours are those that a request names.
        first_chunk: See `ProphetKVConfig`. What `"exact"` computes is found again, in vLLM's prefix cache, by prompts
            that begin with the same chunk.
        encoding_prefix: See `ProphetKVConfig`; a text, or `None` for what `prompt_template` says.
        prompt_template: See `ProphetKVConfig`; `None` for what the chat template opens with.
        namespace: See `ProphetKVConfig`.
        min_chunk_tokens: Requests with fewer known chunk tokens are left to vLLM.
        max_stage_tokens: Rows of stage I and II and tokens of new chunks that one step computes at most, so that the
            decoding of others waits no longer than for those; `None` for vLLM's own `max_num_batched_tokens`. A single
            request may have more: then it is alone in its step.
        read_ahead_s: How long a request waits at most until its caches are in RAM, while others decode; then the step
            that fills it reads what is missing. 0 for no waiting.
        may_register: Whether requests may bring new chunks.
        ram_bytes: Caches held in RAM by every worker.
        max_bytes: Upper bound of all caches on disk; `None` for none.
        namespace_max_bytes: The same for those of each namespace.
        cache_format: How caches are written (`store.blobs.formats`).
        key_file: Path of the file with the key that caches are encrypted with, the same for all processes; `None` for
            what the environment variable `PROPHETKV_CACHE_KEY` says, if anything.
        model_fingerprint: Take the caches of this `CacheIdentity.model`, as `prophetkv_rag` computes it with
            transformers, instead of this checkpoint's own: for unquantised weights of the same dtype.

    Raises:
        InputError: If a value is outside what is allowed.
    """

    directory: str
    recompute_ratio: float | None = None
    context_share: float = 1.0
    encoding: str = "auto"
    first_chunk: FirstChunk = "opening"
    encoding_prefix: str | None = None
    prompt_template: str | Sequence[Mapping[str, str]] | None = None
    namespace: str = ""
    min_chunk_tokens: int = 64
    max_stage_tokens: int | None = None
    read_ahead_s: float = 1.0
    may_register: bool = True
    ram_bytes: int = 1 << 30
    max_bytes: int | None = None
    namespace_max_bytes: int | None = None
    cache_format: str = "exact"
    key_file: str | None = None
    model_fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.directory, str) or not self.directory:
            msg = f"directory is {self.directory!r}; give the path where chunk caches are kept"
            raise InputError(msg)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and "max_" in name:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                msg = f"{name} is {value!r}; it must be a whole number of at least {least}"
                raise InputError(msg)
        seconds = self.read_ahead_s
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
            msg = f"read_ahead_s is {seconds!r}; it must be a number of seconds, 0 for no waiting"
            raise InputError(msg)
        if not isinstance(self.may_register, bool):
            msg = f"may_register is {self.may_register!r}; it must be true or false"
            raise InputError(msg)
        check_format(self.cache_format)
        self.engine_config()

    @property
    def placed(self) -> Encoding:
        """`encoding`, read."""
        return parse_encoding(self.encoding)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ConnectorSettings:
        """Read `kv_connector_extra_config`.

        Raises:
            InputError: For a name that is not known, a directory that is not named, or a value that is not allowed.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown or "directory" not in given:
            wrong = f"has {', '.join(map(repr, unknown))}" if unknown else "has no 'directory'"
            msg = f"kv_connector_extra_config {wrong}; it takes {', '.join(known)}, and needs directory"
            raise InputError(msg)
        return cls(**given)

    def engine_config(self) -> ProphetKVConfig:
        """What the stages go by.

        Raises:
            InputError: If a value is outside what is allowed.
        """
        try:
            return ProphetKVConfig(
                recompute_ratio=self.recompute_ratio,
                context_share=self.context_share,
                first_chunk=self.first_chunk,
                encoding=self.encoding,
                encoding_prefix=self.encoding_prefix,
                prompt_template=self.prompt_template,
                namespace=self.namespace,
            )
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    def given(self) -> dict[str, Any]:
        """Return what differs from the defaults, as `of` reads it."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    def open_store(self, *, ram_bytes: int) -> DiskStore:
        """Open the store of one of the processes.

        Raises:
            InputError: If the key cannot be read, or is not the one that the caches are encrypted with.
            StoreError: If the directory cannot be used.
        """
        store = open_disk_store(
            Path(self.directory).expanduser(),
            ram_bytes=ram_bytes,
            max_bytes=self.max_bytes,
            namespace_max_bytes=self.namespace_max_bytes,
            blob_format=self.cache_format,
            encryption_key=self.key_file,
        )
        must_be_unlocked(store.files)
        return store


def transfer_config(settings: ConnectorSettings) -> dict[str, Any]:
    """Return `--kv-transfer-config` for these settings."""
    return {
        "kv_connector": "ProphetKVConnector",
        "kv_connector_module_path": "prophetkv_rag.integrations.vllm",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings.given(),
    }


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a client said in `kv_transfer_params["prophetkv"]`; nobody has to say anything.

    Attributes:
        recompute_ratio: Instead of the settings'.
        question_ids: Tokens of a question that does not stand behind the chunks; they ask in stage I.
        enabled: Whether known chunks are reused.
        first_chunk: Instead of the settings'.
        register: Token ids of chunks to encode and keep; the request itself is then answered by vLLM alone.
        in_order: Whether those are a document, in order, so that each is encoded behind those before it.
        behind: Or for each the keys of the chunks that it is encoded behind, the last one right before it: of those
            that are stored, or among `register`.
        as_neighbours: Whether those are its nearest neighbours, each of which is encoded for itself alone.
        refresh: Whether to encode anew what is stored behind others than most of those.
        first_chunks: Whether what is computed are the second caches of known chunks, for prompts that begin with them.
    """

    recompute_ratio: float | None = None
    question_ids: tuple[int, ...] = ()
    enabled: bool = True
    first_chunk: FirstChunk | None = None
    register: tuple[tuple[int, ...], ...] = ()
    in_order: bool = False
    behind: tuple[tuple[str, ...], ...] = ()
    as_neighbours: bool = False
    refresh: bool = False
    first_chunks: bool = False

    @classmethod
    def of(cls, params: Any, *, vocabulary: int) -> RequestOptions:
        """Read a request's `kv_transfer_params`; a client can send anything there.

        Raises:
            InputError: If our part is not as above.
        """
        if not isinstance(params, Mapping) or NAME not in params:
            return cls()
        given = params[NAME]
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not all(name in known for name in given):
            msg = f"kv_transfer_params[{NAME!r}] must be an object with some of {', '.join(known)}"
            raise InputError(msg)
        ratio = given.get("recompute_ratio")
        if ratio is not None:
            if not isinstance(ratio, (int, float)) or isinstance(ratio, bool):
                msg = f"recompute_ratio is {ratio!r}; it must be a number from 0 to 1"
                raise InputError(msg)
            check_recompute_ratio(ratio)
        for name in ("enabled", "in_order", "as_neighbours", "refresh", "first_chunks"):
            if not isinstance(given.get(name, True), bool):
                msg = f"{name} is {given[name]!r}; it must be true or false"
                raise InputError(msg)
        first_chunk = given.get("first_chunk")
        if first_chunk is not None:
            check_first_chunk(first_chunk)
        question = _ids("question_ids", given.get("question_ids", ()), vocabulary, MAX_QUESTION_IDS)
        register = given.get("register", ())
        if not _is_list(register) or len(register) > MAX_REGISTERED:
            msg = f"register must be a list of at most {MAX_REGISTERED} lists of token ids"
            raise InputError(msg)
        chunks = tuple(_ids("a chunk to register", chunk, vocabulary, None) for chunk in register)
        return cls(
            None if ratio is None else float(ratio),
            question,
            given.get("enabled", True),
            first_chunk,
            chunks,
            given.get("in_order", False),
            _behind(given.get("behind", ()), len(chunks)),
            *(given.get(name, False) for name in ("as_neighbours", "refresh", "first_chunks")),
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _behind(given: Any, count: int) -> tuple[tuple[str, ...], ...]:
    is_right = _is_list(given) and len(given) in (0, count) and all(_is_list(keys) for keys in given)
    if not is_right or not all(isinstance(key, str) and is_key(key) for keys in given for key in keys):
        msg = "behind must be a list of lists of chunk keys, one for each chunk of register"
        raise InputError(msg)
    return tuple(tuple(keys) for keys in given)


def _ids(name: str, given: Any, vocabulary: int, most: int | None) -> tuple[int, ...]:
    is_right = _is_list(given) and all(type(token) is int and 0 <= token < vocabulary for token in given)
    if not is_right or (most is not None and len(given) > most):
        bound = "" if most is None else f", at most {most}"
        msg = f"{name} must be a list of token ids from 0 to {vocabulary - 1}{bound}"
        raise InputError(msg)
    return tuple(given)
