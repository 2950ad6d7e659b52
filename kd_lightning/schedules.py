"""Pure functions of training progress.

Each function here returns a schedule: a function of the progress in [0, 1] (the share of optimizer steps taken) that
returns a value. Schedules print with their arguments, and pickle.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

Schedule = Callable[[float], float]
"""Training progress in [0, 1] to a value."""


def constant(value: float) -> Schedule:
    """Return ``value`` throughout."""
    return partial(_constant, value)


def linear(start: float, end: float) -> Schedule:
    """Go from ``start`` to ``end`` in a straight line: start + (end − start)·p.

    Example:
        >>> linear(8.0, 1.0)(0.5)
        4.5
    """
    return partial(_linear, start, end)


def cosine(start: float, end: float) -> Schedule:
    """Go from ``start`` to ``end`` along half a cosine: end + (start − end)·(1 + cos πp)/2.

    Example:
        >>> cosine(8.0, 2.0)(0.5)
        5.0
    """
    return partial(_cosine, start, end)


def exponential(start: float, end: float) -> Schedule:
    """Go from ``start`` to ``end`` by equal factors: start·(end/start)^p.

    Raises:
        ValueError: Unless both are positive.

    Example:
        >>> exponential(16.0, 1.0)(0.5)
        4.0
    """
    if not (start > 0 and end > 0):
        raise ValueError(f"expected positive start and end, got {start} and {end}: use linear to reach or cross 0")
    return partial(_exponential, start, end)


def step(values: Sequence[float], boundaries: Sequence[float]) -> Schedule:
    """Hold each value until its boundary: values[i] while boundaries[i−1] ≤ p < boundaries[i].

    Raises:
        ValueError: Unless there is one value more than boundaries, and these rise strictly within (0, 1).

    Example:
        >>> [step([8.0, 4.0, 1.0], [0.5, 0.75])(p) for p in (0.0, 0.5, 0.9)]
        [8.0, 4.0, 1.0]
    """
    _check_boundaries(len(values), boundaries, "values")
    return partial(_step, tuple(values), tuple(boundaries))


def warmup(end: float, duration: float, start: float = 0.0) -> Schedule:
    """Go from ``start`` to ``end`` in a straight line over the first ``duration``, then stay.

    Args:
        end: The value after the warm-up.
        duration: Share of the training, in (0, 1].
        start: The value at the beginning.

    Raises:
        ValueError: For a duration outside (0, 1].

    Example:
        >>> [warmup(2.0, duration=0.1)(p) for p in (0.0, 0.05, 0.5)]
        [0.0, 1.0, 2.0]
    """
    if not 0 < duration <= 1:
        raise ValueError(f"expected duration in (0, 1], the share of the training, got {duration}")
    return partial(_warmup, start, end, duration)


def join(schedules: Sequence[Schedule], boundaries: Sequence[float]) -> Schedule:
    """Run schedules one after the other, each stretched over its own part of the training.

    Raises:
        ValueError: Unless there is one schedule more than boundaries, and these rise strictly within (0, 1).

    Example:
        >>> both = join([constant(8.0), linear(8.0, 1.0)], [0.5])
        >>> [both(p) for p in (0.25, 0.5, 0.75, 1.0)]
        [8.0, 8.0, 4.5, 1.0]
    """
    _check_boundaries(len(schedules), boundaries, "schedules")
    return partial(_join, tuple(schedules), tuple(boundaries))


def _constant(value: float, progress: float) -> float:
    return value


def _linear(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _exponential(start: float, end: float, progress: float) -> float:
    return float(start * (end / start) ** progress)


def _step(values: tuple[float, ...], boundaries: tuple[float, ...], progress: float) -> float:
    return values[bisect_right(boundaries, progress)]


def _warmup(start: float, end: float, duration: float, progress: float) -> float:
    return _linear(start, end, min(progress / duration, 1.0))


def _join(schedules: tuple[Schedule, ...], boundaries: tuple[float, ...], progress: float) -> float:
    part = bisect_right(boundaries, progress)
    low, high = (0.0, *boundaries)[part], (*boundaries, 1.0)[part]
    return schedules[part]((progress - low) / (high - low))


def _check_boundaries(parts: int, boundaries: Sequence[float], what: str) -> None:
    if parts != len(boundaries) + 1:
        raise ValueError(
            f"expected one boundary fewer than {what}, got boundaries {list(boundaries)} for {parts} {what}"
        )
    edges = [0.0, *boundaries, 1.0]
    if not all(a < b for a, b in pairwise(edges)):  # NaN compares as neither
        raise ValueError(f"expected boundaries that rise strictly between 0 and 1, got {list(boundaries)}")
