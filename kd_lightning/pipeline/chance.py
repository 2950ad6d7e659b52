"""Whether a network has learned anything: a comparison with one that has not is an empty one."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

AT_CHANCE, ONE_CLASS = "is at chance", "predicts a single class"
_TOO_FEW_TO_JUDGE = 100


def at_chance(accuracy: float, classes: int, count: int) -> bool:
    """Tell whether an accuracy on ``count`` samples is not above 1/C by three standard errors."""
    chance = 1 / classes
    return accuracy <= chance + 3 * math.sqrt(chance * (1 - chance) / count)


def learned_nothing(predictions: NDArray[np.integer[Any]], target: NDArray[np.integer[Any]]) -> str | None:
    """Return what is wrong with predictions, :data:`AT_CHANCE` or :data:`ONE_CLASS`; None where nothing is.

    None as well for fewer than 100 samples, or targets of one class: they tell nothing.
    """
    classes = len(np.unique(target))
    if len(target) < _TOO_FEW_TO_JUDGE or classes < 2:
        return None
    if len(np.unique(predictions)) == 1:
        return ONE_CLASS
    return AT_CHANCE if at_chance(float(np.mean(predictions == target)), classes, len(target)) else None
