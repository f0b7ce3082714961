"""RULER's length rule: as much haystack as fits, tokens of the prompt and the answer together."""

from __future__ import annotations

from collections.abc import Callable


def largest_size(fits: Callable[[int], bool], low: int, high: int | None = None) -> int:
    """Return the largest size that fits, by doubling and then bisection.

    Args:
        fits: Whether a size fits; true up to some size and false above it.
        low: A size that fits.
        high: Largest size allowed, if there is an end.
    """
    good, bad = low, low
    while bad == good:
        step = 2 * good if high is None else min(2 * good, high)
        if step == good:
            return good
        bad = step
        if fits(step):
            good = step
    return _bisect(fits, good, bad)


def reduced_size(fits: Callable[[int], bool], low: int, start: int) -> int | None:
    """Return the largest size from `low` to `start` that fits, or `None`; few steps where `start` is nearly right."""
    if fits(start):
        return start
    bad, step = start, 1
    while bad > low:
        good = max(low, bad - step)
        if fits(good):
            return _bisect(fits, good, bad)
        bad, step = good, 2 * step
    return None


def _bisect(fits: Callable[[int], bool], good: int, bad: int) -> int:
    """Return a size that fits and whose successor does not, between one that does and one that does not."""
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good
