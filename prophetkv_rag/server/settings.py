"""The settings of the server: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from prophetkv_rag.errors import InputError

_ORIGIN = re.compile(r"\*|null|(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://[^/\\?#@\sA-Z]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of `create_app`.

    Attributes:
        model_name: What clients call the model; a request for another one is an error.
        api_keys: Clients must send one of these as `Authorization: Bearer KEY`; empty for no check. Never printed.
        max_queue: Requests that may wait while one is answered; further ones are told to come back (429).
        max_body_bytes: Longest request body, but for a conversation's.
        max_conversation_bytes: Longest conversation that is given out or taken back by `/v1/conversations`; two at a
            time are, and each is in memory up to three times meanwhile.
        deadline_s: Longest time for a request, waiting included; `None` for no limit. A request may ask for less.
        default_max_tokens: Longest answer where a request does not say, in tokens.
        cors_origins: Web pages of these origins (`https://chat.example.com`) may call the server from a browser; `"*"`
            for those of any.
        ping_s: A stream that has nothing to say for so long sends a comment, so that no proxy closes it.

    Raises:
        InputError: If a value is outside what is allowed.
    """

    model_name: str
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_queue: int = 32
    max_body_bytes: int = 8 * 1024 * 1024
    max_conversation_bytes: int = 512 * 1024 * 1024
    deadline_s: float | None = None
    default_max_tokens: int = 512
    cors_origins: tuple[str, ...] = ()
    ping_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.model_name:
            msg = "model_name is empty; give the name that clients send as `model`"
            raise InputError(msg)
        if any(not key.strip() for key in self.api_keys):
            msg = "an API key is empty; give at least one character, or no key for no check"
            raise InputError(msg)
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                msg = (
                    f"{origin!r} is no origin as browsers send them; give scheme, host and, unless it is the scheme's "
                    "own, port, in lower case: https://chat.example.com, http://localhost:3000; or * for any"
                )
                raise InputError(msg)
        leasts = (("max_queue", 0), ("max_body_bytes", 1), ("max_conversation_bytes", 1), ("default_max_tokens", 1))
        for name, least in leasts:
            value = getattr(self, name)
            if value < least:
                msg = f"{name} is {value}; it must be at least {least}"
                raise InputError(msg)
        for name, seconds in (("deadline_s", self.deadline_s), ("ping_s", self.ping_s)):
            if seconds is not None and not 0 < seconds < math.inf:
                msg = f"{name} is {seconds}; it must be a positive number of seconds"
                raise InputError(msg)
