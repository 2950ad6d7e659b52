"""How sure a difference between two trained networks is: intervals paired over seeds and test samples.

Every network is trained with the same seeds and tested on the same images, so what is compared is never two averages
but the same image under the same seed, once with each network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit

Correct = NDArray[np.bool_]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, as fractions (0.01 is one point of accuracy)."""

    mean: float
    low: float
    high: float

    def __neg__(self) -> "Interval":
        """Return the same difference, taken the other way round."""
        return Interval(-self.mean, -self.high, -self.low)


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval; 1.0 is the whole gap.

    `mean` is None where the gap is not positive: a share of it would mean nothing. `low` and `high` are None where the
    gap cannot be told from zero: then no share, however large, can be excluded.
    """

    mean: float | None
    low: float | None
    high: float | None


def paired_difference(a_correct: Correct, b_correct: Correct) -> Interval:
    r"""95 % interval of accuracy(a) - accuracy(b), paired over seeds and test samples.

    With x[s, i] = a[s, i] - b[s, i] in {-1, 0, 1}, d[s] its mean over samples and m[i] its mean over seeds:

        v_seeds   = sd(d)^2 / S      another training run would have come out differently
        v_samples = sd(m)^2 / N      another test set would have come out differently; shared by all seeds
        mean(x) ± t(0.975, df) * sqrt(v_seeds + v_samples)
        df = (v_seeds + v_samples)^2 / (v_seeds^2 / (S - 1) + v_samples^2 / (N - 1))     (Welch-Satterthwaite)

    The noise of one image under one seed is in both terms, so the interval is slightly too wide, never too narrow for
    that reason. With one seed v_seeds is not known and left out: the interval then speaks of these very weights, not
    of what training again would give.

    Shape: a_correct (S, N) and b_correct (S, N), True where the prediction is right; one of them may be (1, N), a
        network trained once (a teacher): it is compared with every seed of the other, and the interval is about it.

    Raises:
        ValueError: shapes that cannot be paired.

    Example:
        >>> a = np.array([[1, 1, 1, 0], [1, 1, 0, 1]], dtype=bool)
        >>> b = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=bool)
        >>> paired_difference(a, b).mean
        0.25
    """
    difference = _difference(a_correct, b_correct)
    mean = float(difference.mean())
    margin = _margin(difference.mean(axis=1), difference.mean(axis=0))
    return Interval(mean, mean - margin, mean + margin)


def paired_contrast(a: Correct, b: Correct, c: Correct, d: Correct) -> Interval:
    """95 % interval of (accuracy(a) - accuracy(b)) - (accuracy(c) - accuracy(d)), paired as in `paired_difference`.

    How much more one change brings than another, each against its own control.

    Shape: (S, N) all four.

    Raises:
        ValueError: shapes that cannot be paired.
    """
    first, second = _difference(a, b), _difference(c, d)
    if first.shape != second.shape:
        raise ValueError(f"expected the same seeds and samples of all four, got {first.shape} and {second.shape}")
    contrast = first - second
    mean = float(contrast.mean())
    margin = _margin(contrast.mean(axis=1), contrast.mean(axis=0))
    return Interval(mean, mean - margin, mean + margin)


def paired_p_value(a_correct: Correct, b_correct: Correct) -> float:
    """Two-sided p of no difference: below 0.05 exactly where the interval of `paired_difference` excludes zero.

    Shape: as in `paired_difference`.

    Raises:
        ValueError: shapes that cannot be paired.
    """
    difference = _difference(a_correct, b_correct)
    error, degrees = _standard_error(difference.mean(axis=1), difference.mean(axis=0))
    mean = abs(float(difference.mean()))
    return float(2 * stdtr(degrees, -mean / error)) if error else float(mean == 0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm, 1979): those below 0.05 hold together, at 5 % for any false one.

    The k-th smallest of n is multiplied by n - k + 1; none is smaller than one before it.

    Example:
        >>> holm([0.5, 0.0625, 0.25])
        [0.5, 0.1875, 0.5]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for left, i in zip(range(len(p_values), 0, -1), order, strict=True):
        largest = max(largest, min(left * p_values[i], 1.0))
        adjusted[i] = largest
    return adjusted


def gap_closed(teacher: Correct, alone: Correct, distilled: Correct) -> Share:
    """Share of the teacher-student gap that distillation closes, (distilled - alone) / (teacher - alone).

    The interval is Fieller's (1954): the shares r for which the paired test of `paired_difference` on the contrast
    (distilled - alone) - r * (teacher - alone) finds no difference. It is not symmetric about the estimate, and knows
    that student alone stands in both terms.

    Shape: teacher (1, N) or (S, N), alone and distilled (S, N), True where the prediction is right.

    Raises:
        ValueError: shapes that cannot be paired.
    """
    gain, gap = _difference(distilled, alone), _difference(teacher, alone)
    if len(gain) != len(gap):
        raise ValueError(
            f"distilled and alone make {len(gain)} pairs of seeds, teacher and alone {len(gap)}: "
            "pass the same seeds of alone and distilled, and one teacher or one for each seed"
        )
    if gap.mean() <= 0:
        return Share(None, None, None)
    gain_seeds, gain_samples, gap_seeds, gap_samples = gain.mean(1), gain.mean(0), gap.mean(1), gap.mean(0)
    estimate = float(gain.mean() / gap.mean())
    # As r grows the contrast is that of the gap itself: where it cannot be told from zero, no r is ever excluded.
    if gap.mean() - _margin(gap_seeds, gap_samples) < 1e-9:
        return Share(estimate, None, None)

    def excluded(r: float) -> float:
        """Positive where the test rejects r."""
        margin = _margin(gain_seeds - r * gap_seeds, gain_samples - r * gap_samples)
        return abs(float(gain.mean() - r * gap.mean())) - margin

    def bound(direction: float) -> float:
        step = direction
        while excluded(estimate + step) <= 0:
            step *= 2
        return float(brentq(excluded, estimate, estimate + step))

    if excluded(estimate) > -1e-12:  # the contrast has no variance: distilled is the teacher, or the student alone
        return Share(estimate, estimate, estimate)
    return Share(estimate, bound(-1.0), bound(1.0))


def _difference(a_correct: Correct, b_correct: Correct) -> NDArray[np.float64]:
    a, b = np.asarray(a_correct, dtype=np.float64), np.asarray(b_correct, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] < 2 or min(len(a), len(b)) < 1:
        raise ValueError(
            f"expected two arrays (seeds, samples) on the same 2 or more test samples, got {a.shape} and {b.shape}: "
            "test both networks on the same images in the same order"
        )
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(f"got {len(a)} and {len(b)} seeds: pass the runs of the seeds that both have, in one order")
    return np.asarray(a - b)


def _margin(by_seed: NDArray[np.float64], by_sample: NDArray[np.float64]) -> float:
    """Half the width of the 95 % interval, from the S seeds' means and the N samples' means."""
    error, degrees = _standard_error(by_seed, by_sample)
    return float(stdtrit(degrees, 0.975)) * error


def _standard_error(by_seed: NDArray[np.float64], by_sample: NDArray[np.float64]) -> tuple[float, float]:
    """Return the standard error of the mean and its degrees of freedom; zero for a contrast without variance."""
    s, n = len(by_seed), len(by_sample)
    v_seeds = float(by_seed.var(ddof=1)) / s if s > 1 else 0.0
    v_samples = float(by_sample.var(ddof=1)) / n
    v = v_seeds + v_samples
    if v < 1e-24:  # rounding
        return 0.0, 1.0
    a, b = v_seeds / v, v_samples / v
    return float(np.sqrt(v)), 1 / (a**2 / max(s - 1, 1) + b**2 / (n - 1))
