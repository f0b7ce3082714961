"""A profile: which strategy and ratio keep a wanted fidelity on one model, as `prophetkv-rag calibrate` found out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prophetkv_rag.config import Encoding, ProphetKVConfig, parse_encoding
from prophetkv_rag.errors import InputError
from prophetkv_rag.store import write_file

VERSION = 1

PROMPT, CORPUS = "prompt", "corpus"
"""What stands behind the `@` of a strategy: what its chunks were encoded behind, the opening of the prompts
(`ProphetKVConfig.prompt_template`), other text of the same collection (`lead_in`), other chunks (`encoding`), or
several of these (`prompt+corpus+previous:2`)."""


def parse_behind(text: str) -> tuple[bool, bool, Encoding]:
    """Read what stands behind the `@`: whether the opening and a lead-in are there, and which other chunks.

    Raises:
        InputError: If it is none.
    """
    parts = text.split("+") if text else []
    others = [part for part in parts if part not in (PROMPT, CORPUS)]
    try:
        in_order = [part for part in (PROMPT, CORPUS, *others) if part in parts] == parts
        if {"plain", "auto"}.intersection(others) or not in_order:
            raise InputError
        return PROMPT in parts, CORPUS in parts, parse_encoding("+".join(others) or "plain")
    except InputError:
        msg = (
            f"unknown encoding {text!r}; allowed: {PROMPT}, {CORPUS}, and previous:N or neighbours:N, or several of "
            "these in this order, joined by +"
        )
        raise InputError(msg) from None


def encoding_of(config: ProphetKVConfig) -> str:
    """Return what an engine of these settings encodes chunks behind, as it stands behind the `@`; "" for neither."""
    parts = ((PROMPT, config.prompt_template), (CORPUS, config.lead_in))
    # An encoding prefix of the caller's is all there is of prefixes.
    names = [name for name, given in parts if given is not None and config.encoding_prefix is None]
    encoding = parse_encoding(config.encoding)
    return "+".join(names if encoding.kind == "plain" else [*names, str(encoding)])


@dataclass(frozen=True, slots=True)
class CalibratedStrategy:
    """One strategy's outcome.

    Attributes:
        strategy: As `make_strategy` reads it; behind `@` what the chunks were encoded behind.
        recompute_ratio: The smallest measured ratio that keeps the wanted agreement; `None` if none below 1 does.
        charged_ratio: The budget really spent at that ratio.
        curve: What was measured per ratio: `recompute_ratio`, `charged_ratio`, `top1_agreement` with its 95% interval
            (`top1_low`, `top1_high`), and `kl`.
    """

    strategy: str
    recompute_ratio: float | None
    charged_ratio: float | None
    curve: tuple[dict[str, float], ...]

    @property
    def spec(self) -> str:
        """What `make_strategy` reads."""
        return self.strategy.partition("@")[0]

    @property
    def encoding(self) -> str:
        """What the chunks were encoded behind; "" for the chat template's opening alone."""
        return self.strategy.partition("@")[2]


@dataclass(frozen=True, slots=True)
class Profile:
    """The outcome of a calibration.

    It holds no lead-in and no template: those are texts of the application's own, and decide at index time what a cache
    is. A profile says which ratio suffices where caches are of that kind.

    Attributes:
        model: Name of the model, for people.
        model_fingerprint: Hex fingerprint of its weights (`model.model_fingerprint`).
        wanted_agreement: Share of full prefill's answer tokens that the reused caches must choose too, in (0, 1].
        examples: How many questions were measured.
        strategies: The outcome per strategy, the best first: the smallest charged budget.
        chunk_tokens: Size of the chunks that were measured, which the outcome depends on; 0 if a profile does not say.
        answer_tokens: Longest answer that was compared, in tokens; 0 if a profile does not say.
    """

    model: str
    model_fingerprint: str
    wanted_agreement: float
    examples: int
    strategies: tuple[CalibratedStrategy, ...]
    chunk_tokens: int = 0
    answer_tokens: int = 0

    @property
    def best(self) -> CalibratedStrategy | None:
        """The strategy with the smallest charged budget; `None` if all need full prefill."""
        return next((one for one in self.strategies if one.recompute_ratio is not None), None)

    def apply_to(self, config: ProphetKVConfig, *, model_fingerprint: str) -> ProphetKVConfig:
        """Return `config` with the best strategy that was measured with its encoding, and that one's ratio.

        Full prefill if none of those kept the fidelity.

        Raises:
            InputError: If the profile was made for other weights, or nothing was measured with the config's encoding.
        """
        if self.model_fingerprint != model_fingerprint:
            msg = (
                f"the profile was made for {self.model!r}, whose weights differ from this model's; run `prophetkv-rag "
                "calibrate` on this one"
            )
            raise InputError(msg)
        encoding = encoding_of(config)
        allowed = {encoding: config.encoding}
        if config.encoding == "auto":  # what was measured decides
            allowed[encoding_of(replace(config, encoding="plain"))] = "plain"
        measured = [one for one in self.strategies if one.encoding in allowed]
        if self.strategies and not measured:
            raise InputError(self._not_measured([*allowed][-1]))
        best = next((one for one in measured if one.recompute_ratio is not None), None)
        if best is None or best.recompute_ratio is None:
            return replace(config, strategy="full_prefill")
        return replace(
            config,
            strategy=best.spec,
            recompute_ratio=best.recompute_ratio,
            encoding=allowed[best.encoding],
            first_chunk="cached",  # as it was measured, where its options do not say more
        )

    def _not_measured(self, encoding: str) -> str:
        wanted = f"prophetkv@{encoding}" if encoding else "prophetkv"
        known = ", ".join(one.strategy for one in self.strategies) or "nothing"
        return (
            f"the profile holds {known}, but this engine encodes chunks {_settings(encoding)}; run `prophetkv-rag "
            f"calibrate` with --strategy {wanted} too, or give the engine the settings that were measured"
        )

    def save(self, path: Path) -> None:
        """Write the profile; an older file is replaced at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path.absolute(), (json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n").encode())


def _settings(encoding: str) -> str:
    has_opening, has_lead_in, others = parse_behind(encoding)
    given = ["prompt_template"] * has_opening + ["lead_in"] * has_lead_in
    given += [f"encoding={str(others)!r}"] * (others.kind != "plain")
    return f"with {' and '.join(given)}" if given else "with neither prompt_template nor lead_in"


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        InputError: If there is no such file, or it is not a profile of this version.
    """
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        version = data.pop("version")
        if version != VERSION:
            msg = f"{path} is a profile of version {version}, and this is version {VERSION}; run calibrate again"
            raise InputError(msg)
        strategies = tuple(
            CalibratedStrategy(**(one | {"curve": tuple(one["curve"])})) for one in data.pop("strategies")
        )
        return Profile(strategies=strategies, **data)
    except FileNotFoundError as error:
        msg = f"no profile {path}; make one with: prophetkv-rag calibrate MODEL --data FILE"
        raise InputError(msg) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        msg = f"{path} is not a profile ({type(error).__name__}: {error}); make one with: prophetkv-rag calibrate"
        raise InputError(msg) from error


def with_profile(
    config: ProphetKVConfig, profile: str | Path | Profile | None, *, model_fingerprint: str
) -> ProphetKVConfig:
    """Return the settings as a profile has them, which may be a file; as they are without one.

    Raises:
        InputError: As `load_profile` and `Profile.apply_to`.
    """
    if profile is None:
        return config
    found = profile if isinstance(profile, Profile) else load_profile(profile)
    return found.apply_to(config, model_fingerprint=model_fingerprint)
