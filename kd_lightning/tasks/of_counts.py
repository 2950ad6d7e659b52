"""Headlines that are ratios of counts over all units: the mean over classes, each of which counts the same.

A class that is neither there nor given by an answer is left out.

Shape: (C, 2), a class's two counts; sums or means over units.
"""

import math

import numpy as np
from numpy.typing import NDArray


def macro_f1(counts: NDArray[np.float64]) -> float:
    """Return the mean of 2·TP / (2·TP + FP + FN), of how often a class is rightly given, and given by target or answer.

    What both target and answer give counts twice in the second.
    """
    return _mean_ratio(2 * counts[:, 0], counts[:, 1])


def mean_iou(counts: NDArray[np.float64]) -> float:
    """Return the mean of intersection / union."""
    return _mean_ratio(counts[:, 0], counts[:, 1])


def _mean_ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> float:
    some = whole > 0
    return float((part[some] / whole[some]).mean()) if some.any() else math.nan
