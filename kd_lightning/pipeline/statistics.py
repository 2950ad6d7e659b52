"""How sure a difference between two trained networks is: intervals paired over seeds and test units.

Every network is trained with the same seeds and tested on the same units (images, sentences), so what is compared is
never two averages but the same unit under the same seed, once with each network.

Why no bootstrap over the seeds: it would resample the three values that there are. Their resampled variance is 2/3 of
an unbiased estimate, and its percentiles stand in for a t with 2 degrees of freedom, whose 97.5 % point is 4.3 and not
1.96: such an interval has well under half of the width that it needs. Units are many, so for them both hold.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit
from scipy.stats import DegenerateDataWarning, bootstrap

from kd_lightning.headline import Headline
from kd_lightning.records import Interval, Share

_RESAMPLES = 2000  # the standard error of a standard error is then 1.6 % of it


@dataclass(frozen=True, eq=False)
class Performance:
    """A model's headline under each seed, and how it depends on the test units; more is better.

    Where lower is better the signs are turned, so that a difference is always an improvement.

    Attributes:
        by_seed: (S,) the headline of each seed's run.
        by_unit: (S, N) scores whose mean is the headline; (S, B) the headline of B resamples of the units where it is
            a function of the scores' mean. The same units, or the same resamples, for every model.
        units: N.
        resampled: whether `by_unit` holds resamples.
    """

    by_seed: NDArray[np.float64]
    by_unit: NDArray[np.float64]
    units: int
    resampled: bool = False

    @classmethod
    def of(cls, scores: ArrayLike, headline: Headline) -> "Performance":
        """Judge scores by a headline.

        Shape: scores (S, N), or (S, N, K...) where the headline is a function of their mean over units.

        Raises:
            ValueError: scores of another shape, or of fewer than 2 units.
        """
        scores = np.asarray(scores, dtype=np.float64)
        kind = "(seeds, units)" if headline.of_mean is None else "(seeds, units, ...)"
        wrong = scores.ndim != 2 if headline.of_mean is None else scores.ndim < 2
        if wrong or scores.shape[1] < 2 or len(scores) < 1:
            raise ValueError(
                f"expected scores {kind} on 2 or more test units for {headline.name}, got {scores.shape}: "
                "pass one row of scores for each seed's run"
            )
        sign = 1.0 if headline.higher_is_better else -1.0
        by_seed = sign * np.array([headline.value(run) for run in scores])
        if headline.of_mean is None:
            return cls(by_seed, sign * scores, scores.shape[1])
        return cls(by_seed, sign * _resampled(scores, headline), scores.shape[1], resampled=True)

    def seeds(self, rows: Sequence[int]) -> "Performance":
        """Return some of the seeds, in that order."""
        return replace(self, by_seed=self.by_seed[list(rows)], by_unit=self.by_unit[list(rows)])

    def __sub__(self, other: "Performance") -> "Performance":
        """Pair two models; one that was trained once (a teacher) goes with every seed of the other.

        Raises:
            ValueError: other units, or other numbers of seeds.
        """
        if self.units != other.units or self.resampled != other.resampled:
            raise ValueError(
                f"expected the same test units of both, got {self.units} and {other.units}: "
                "test both networks on the same units in the same order"
            )
        seeds = len(self.by_seed), len(other.by_seed)
        if seeds[0] != seeds[1] and 1 not in seeds:
            raise ValueError(
                f"got {seeds[0]} and {seeds[1]} seeds: pass the runs of the seeds that both have, in one order"
            )
        return replace(self, by_seed=self.by_seed - other.by_seed, by_unit=self.by_unit - other.by_unit)

    @property
    def mean(self) -> float:
        return float((self.by_seed if self.resampled else self.by_unit).mean())

    def means(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the seeds' means (S,), and over seeds the units' (N,) or the resamples' (B,)."""
        # Those of scores follow from the contrast itself: rounding must not make a variance.
        return self.by_seed if self.resampled else self.by_unit.mean(axis=1), self.by_unit.mean(axis=0)

    def interval(self) -> Interval:
        """Return the mean with its 95 % interval."""
        mean, margin = self.mean, self.margin(*self.means())
        return Interval(mean, mean - margin, mean + margin)

    def margin(self, by_seed: NDArray[np.float64], by_unit: NDArray[np.float64]) -> float:
        """Return half the width of the 95 % interval, from means or a contrast of them."""
        error, degrees = self.standard_error(by_seed, by_unit)
        return float(stdtrit(degrees, 0.975)) * error

    def standard_error(self, by_seed: NDArray[np.float64], by_unit: NDArray[np.float64]) -> tuple[float, float]:
        """Return the standard error of the mean and its degrees of freedom; zero for a contrast without variance."""
        s, n = len(by_seed), self.units
        v_seeds = float(by_seed.var(ddof=1)) / s if s > 1 else 0.0
        # Of a mean, resampling gives (n - 1) / n of the unbiased variance. A resample without a rare class may be NaN.
        v_units = float(np.nanvar(by_unit)) * n / (n - 1) if self.resampled else float(by_unit.var(ddof=1)) / n
        v = v_seeds + v_units
        if v < 1e-24:  # rounding
            return 0.0, 1.0
        a, b = v_seeds / v, v_units / v
        return float(np.sqrt(v)), 1 / (a**2 / max(s - 1, 1) + b**2 / (n - 1))


def paired_difference(a: Performance, b: Performance) -> Interval:
    r"""95 % interval of the improvement of a on b, paired over seeds and test units.

    With x[s, i] = a[s, i] - b[s, i], d[s] its mean over units and m[i] its mean over seeds:

        v_seeds = sd(d)^2 / S      another training run would have come out differently
        v_units = sd(m)^2 / N      another test set would have come out differently; shared by all seeds
        mean(x) ± t(0.975, df) * sqrt(v_seeds + v_units)
        df = (v_seeds + v_units)^2 / (v_seeds^2 / (S - 1) + v_units^2 / (N - 1))     (Welch-Satterthwaite)

    Where the headline is no mean of scores, d[s] is the difference of two headlines, and v_units the variance of their
    mean over seeds when the units are resampled with replacement, the same for all seeds and both models (a paired
    bootstrap; Efron and Tibshirani, 1993, ch. 6). Seeds are never resampled: see the module.

    The noise of one unit under one seed is in both terms, so the interval is slightly too wide, never too narrow for
    that reason. With one seed v_seeds is not known and left out: the interval then speaks of these very weights, not
    of what training again would give.

    Raises:
        ValueError: performances that cannot be paired.

    Example:
        >>> accuracy = Headline(name="accuracy", key="acc", units="images")
        >>> a = Performance.of([[1, 1, 1, 0], [1, 1, 0, 1]], accuracy)
        >>> b = Performance.of([[1, 0, 1, 0], [0, 1, 0, 1]], accuracy)
        >>> paired_difference(a, b).mean
        0.25
    """
    return (a - b).interval()


def paired_contrast(a: Performance, b: Performance, c: Performance, d: Performance) -> Interval:
    """95 % interval of (a - b) - (c - d), paired as in `paired_difference`.

    How much more one change brings than another, each against its own control.

    Raises:
        ValueError: performances that cannot be paired.
    """
    first, second = a - b, c - d
    if first.by_unit.shape != second.by_unit.shape:
        raise ValueError(
            "expected the same seeds and units of all four, got "
            f"{len(first.by_seed)} seeds, {first.units} units and {len(second.by_seed)} seeds, {second.units} units"
        )
    return (first - second).interval()


def paired_p_value(a: Performance, b: Performance) -> float:
    """Two-sided p of no difference: below 0.05 exactly where the interval of `paired_difference` excludes zero.

    Raises:
        ValueError: performances that cannot be paired.
    """
    difference = a - b
    error, degrees = difference.standard_error(*difference.means())
    mean = abs(difference.mean)
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


def gap_closed(teacher: Performance, alone: Performance, distilled: Performance) -> Share:
    """Share of the teacher-student gap that distillation closes, (distilled - alone) / (teacher - alone).

    The interval is Fieller's (1954): the shares r for which the paired test of `paired_difference` on the contrast
    (distilled - alone) - r * (teacher - alone) finds no difference. It is not symmetric about the estimate, and knows
    that student alone stands in both terms.

    Args:
        teacher: With one seed, or those of the students.
        alone: The student without a teacher.
        distilled: With the seeds of `alone`.

    Raises:
        ValueError: performances that cannot be paired.
    """
    gain, gap = distilled - alone, teacher - alone
    if len(gain.by_seed) != len(gap.by_seed):
        raise ValueError(
            f"distilled and alone make {len(gain.by_seed)} pairs of seeds, teacher and alone {len(gap.by_seed)}: "
            "pass the same seeds of alone and distilled, and one teacher or one for each seed"
        )
    if not gap.mean > 0:
        return Share(None, None, None)
    estimate = gain.mean / gap.mean
    # As r grows the contrast is that of the gap itself: where it cannot be told from zero, no r is ever excluded.
    (gain_seeds, gain_units), (gap_seeds, gap_units) = gain.means(), gap.means()
    if gap.mean - gap.margin(gap_seeds, gap_units) < 1e-9:
        return Share(estimate, None, None)

    def excluded(r: float) -> float:
        """Positive where the test rejects r."""
        margin = gain.margin(gain_seeds - r * gap_seeds, gain_units - r * gap_units)
        return abs(gain.mean - r * gap.mean) - margin

    def bound(direction: float) -> float:
        step = direction
        while excluded(estimate + step) <= 0:
            step *= 2
        return float(brentq(excluded, estimate, estimate + step))

    if excluded(estimate) > -1e-12:  # the contrast has no variance: distilled is the teacher, or the student alone
        return Share(estimate, estimate, estimate)
    return Share(estimate, bound(-1.0), bound(1.0))


def _resampled(scores: NDArray[np.float64], headline: Headline) -> NDArray[np.float64]:
    """Return the headline of each run on resamples of the units, (S, B); the same resamples for the same N."""
    of_mean = headline.of_mean
    assert of_mean is not None
    s, n = scores.shape[:2]
    flat = scores.swapaxes(0, 1).reshape(n, -1)

    def statistic(drawn: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        counts = np.stack([np.bincount(units, minlength=n) for units in np.atleast_2d(drawn)])
        means = (counts.astype(np.float64) @ flat / n).reshape(-1, *scores.shape[2:])  # of each resample and seed
        found: NDArray[np.float64] = np.array([of_mean(mean) for mean in means]).reshape(-1, s).T
        return found if drawn.ndim > 1 else found[:, 0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # NaN: see Performance.standard_error
        result = bootstrap(
            (np.arange(n),),
            statistic,
            n_resamples=_RESAMPLES,
            batch=100,
            vectorized=True,
            method="percentile",
            random_state=np.random.default_rng(0),
        )
    distribution: NDArray[np.float64] = np.asarray(result.bootstrap_distribution)
    return distribution
