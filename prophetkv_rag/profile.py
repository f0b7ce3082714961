"""A profile: which strategy and ratio keep a wanted fidelity on one model, as `prophetkv-rag calibrate` found out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prophetkv_rag.config import ProphetKVConfig
from prophetkv_rag.errors import InputError
from prophetkv_rag.store.files import write_file

VERSION = 1


@dataclass(frozen=True, slots=True)
class CalibratedStrategy:
    """One strategy's outcome.

    Attributes:
        strategy: As `make_strategy` reads it.
        recompute_ratio: The smallest measured ratio that keeps the wanted agreement; `None` if none below 1 does.
        charged_ratio: The budget really spent at that ratio.
        curve: What was measured: `recompute_ratio`, `charged_ratio`, `top1_agreement` and `kl` per ratio.
    """

    strategy: str
    recompute_ratio: float | None
    charged_ratio: float | None
    curve: tuple[dict[str, float], ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """The outcome of a calibration.

    Attributes:
        model: Name of the model, for people.
        model_fingerprint: Hex fingerprint of its weights (`model.model_fingerprint`).
        wanted_agreement: Share of full prefill's answer tokens that the reused caches must choose too, in (0, 1].
        examples: How many questions were measured.
        strategies: The outcome per strategy, the best first: the smallest charged budget.
    """

    model: str
    model_fingerprint: str
    wanted_agreement: float
    examples: int
    strategies: tuple[CalibratedStrategy, ...]

    @property
    def best(self) -> CalibratedStrategy | None:
        """The strategy with the smallest charged budget; `None` if all need full prefill."""
        return next((one for one in self.strategies if one.recompute_ratio is not None), None)

    def apply_to(self, config: ProphetKVConfig, *, model_fingerprint: str) -> ProphetKVConfig:
        """Return `config` with the best strategy and its ratio; full prefill if no strategy kept the fidelity.

        Raises:
            InputError: If the profile was made for other weights.
        """
        if self.model_fingerprint != model_fingerprint:
            msg = (
                f"the profile was made for {self.model!r}, whose weights differ from this model's; run `prophetkv-rag "
                "calibrate` on this one"
            )
            raise InputError(msg)
        best = self.best
        if best is None or best.recompute_ratio is None:
            return replace(config, strategy="full_prefill")
        return replace(config, strategy=best.strategy, recompute_ratio=best.recompute_ratio)

    def save(self, path: Path) -> None:
        """Write the profile; an older file is replaced at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path.absolute(), (json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n").encode())


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
