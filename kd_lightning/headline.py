"""The figure by which a task judges a model, and how it is written."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The figure by which a task judges a model.

    It is the mean of the scores of the test units, or a function of their mean: a mean IoU follows from the mean counts
    of each image's intersections and unions, a perplexity from the mean negative log-likelihood and number of tokens.

    Attributes:
        name: As it stands in a sentence: ``accuracy``, ``mean absolute error``, ``recall@10``.
        key: As it stands in metric names and in JSON: ``acc`` for ``val/acc`` and ``final/acc``.
        units: What a score is of, plural: ``images``, ``sentences``.
        higher_is_better: False for an error.
        percent: Whether it is a share, which is written in percent, and its differences in points.
        symbol: The unit of a figure that is no share: ``bits per character``, ``mm``; empty for none.
        digits: Decimals with which it is written.
        of_mean: From the mean over units of scores (n, ...) to the figure. None where scores are one number for each
            unit and the figure is their mean.

    Example:
        >>> accuracy = Headline(name="accuracy", key="acc", units="images")
        >>> accuracy.value([1, 1, 1, 0]), accuracy.write(0.75), accuracy.write_difference(0.0312)
        (0.75, '75.0 %', '3.1 points')
    """

    name: str
    key: str
    units: str
    higher_is_better: bool = True
    percent: bool = True
    symbol: str = ""
    digits: int = 1
    of_mean: Callable[[NDArray[np.float64]], float] | None = None

    def __post_init__(self) -> None:
        if self.digits < 0:
            raise ValueError(f"expected digits of 0 or more, got {self.digits}")

    def value(self, scores: ArrayLike) -> float:
        """Return the figure of some units.

        Shape: scores (n,), or (n, ...) where the figure is a function of their mean.
        """
        mean = np.asarray(scores, dtype=np.float64).mean(axis=0)
        return float(mean) if self.of_mean is None else float(self.of_mean(mean))

    def better(self, a: float, b: float) -> bool:
        """Tell whether one value is better than another."""
        return a > b if self.higher_is_better else a < b

    def write(self, value: float | None) -> str:
        """Write a value with its unit: ``78.1 %``, ``2.48 bits per character``; ``–`` where it is not known."""
        text = self.number(value)
        unit = "%" if self.percent else self.symbol
        return f"{text} {unit}" if unit and text != "–" else text

    def number(self, value: float | None) -> str:
        """Write a value without its unit, as in a table."""
        if value is None or not math.isfinite(value):
            return "–"
        text = f"{100 * value if self.percent else value:.{self.digits}f}"
        return text.lstrip("-") if float(text) == 0 else text  # no "-0.0"

    def write_difference(self, difference: float) -> str:
        """Write a difference of two values with its unit: ``3.6 points``, ``0.33 bits per character``."""
        unit = "points" if self.percent else self.symbol
        return f"{self.number(difference)} {unit}".rstrip()
