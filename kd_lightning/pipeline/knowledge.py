"""What a teacher knows beyond the label, and whether a student has it too: numbers from the outputs of both.

Shape: logits (P, C), labels (P,), of P places: images, tokens or pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from kd_lightning.tasks.calibration_error import BINS

Array = NDArray[Any]

TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 20.0)
MOST_RESEMBLANCES = 250
"""The most classes of which each pair is compared."""


def softmax(logits: Array, temperature: float = 1.0) -> Array:
    """Return the probabilities at a temperature, in float64."""
    z = logits.astype(np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    softened: Array = e / e.sum(-1, keepdims=True)
    return softened


def entropy(p: Array) -> Array:
    """Return the entropy of each distribution in nats: (P,)."""
    found: Array = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    return found


def resemblance(p: Array, labels: Array) -> Array:
    """Return which classes a model takes the others for: the mean probability of class j where the label is i, j ≠ i.

    Each row is divided by its sum, so that it says *which* classes and not how sure the model is; the diagonal is 0.
    NaN in the rows of classes that no label names.

    Shape: p (P, C); to (C, C).
    """
    classes = p.shape[1]
    sums = np.zeros((classes, classes))
    np.add.at(sums, labels, p)
    np.fill_diagonal(sums, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = sums / sums.sum(1, keepdims=True)
    return found


def inherited(student: Array, teacher: Array) -> float | None:
    """Return Spearman's rank correlation of two resemblances, over all pairs of different classes.

    None where there are fewer than three classes, or too many to compare each pair.
    """
    known = ~np.eye(len(teacher), dtype=bool) & np.isfinite(student) & np.isfinite(teacher)
    if not 3 <= len(teacher) <= MOST_RESEMBLANCES or known.sum() < 3:
        return None
    value = float(spearmanr(student[known], teacher[known]).statistic)
    return value if np.isfinite(value) else None


class Calibration(NamedTuple):
    """How often a model is right, by how sure it is.

    Attributes:
        confidence: Mean probability of its answers, by bin; bins without answers are left out.
        right: Share of them that are right.
        answers: Number of them.
        ece: Expected calibration error: the mean distance of the two, by the number of answers.
    """

    confidence: list[float]
    right: list[float]
    answers: list[int]
    ece: float


def calibration(confidence: Array, right: Array) -> Calibration:
    """Compare confidences with how often they are right, in 15 bins of equal width. Shape: both (P,)."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    some = count > 0
    mean, share = (np.bincount(bins, x, BINS)[some] / count[some] for x in (confidence, right.astype(float)))
    ece = float((np.abs(mean - share) * count[some]).sum() / max(len(confidence), 1))
    return Calibration(mean.tolist(), share.tolist(), count[some].tolist(), ece)


def over_temperatures(logits: Array) -> dict[str, list[float]]:
    """Return what the teacher's soft target has to say at each of :data:`TEMPERATURES`.

    ``entropy`` is the mean entropy as a share of log C; ``others`` the mean probability of all classes but the most
    likely one.
    """
    soft = [softmax(logits, t) for t in TEMPERATURES]
    most = np.log(max(logits.shape[1], 2))
    return {
        "temperature": list(TEMPERATURES),
        "entropy": [float(entropy(p).mean() / most) for p in soft],
        "others": [float(1 - p.max(-1).mean()) for p in soft],
    }


def gradient_share(student: Array, teacher: Array, labels: Array, weights: tuple[float, float]) -> list[float]:
    """Return which share of the gradient on the student's logits is the soft target's, at each of the temperatures.

    The gradient of KD is w·T·(softmax(z_s / T) − softmax(z_t / T)) (Hinton et al., 2015, with the factor T²), that of
    the hard label w·(softmax(z_s) − y); compared are their Euclidean norms, averaged over places.

    Args:
        student: Its logits.
        teacher: The teacher's.
        labels: Class indices.
        weights: Of KD, and of the hard label's loss.
    """
    hard = softmax(student)
    hard[np.arange(len(labels)), labels] -= 1
    of_label = weights[1] * np.linalg.norm(hard, axis=1)
    found = []
    for t in TEMPERATURES:
        of_teacher = weights[0] * t * np.linalg.norm(softmax(student, t) - softmax(teacher, t), axis=1)
        found.append(float((of_teacher / np.maximum(of_teacher + of_label, 1e-12)).mean()))
    return found


def choose(score: Array, groups: Array, count: int) -> list[int]:
    """Return the places with the highest scores, at most one of a group while there are others: -inf is never chosen.

    Args:
        score: (P,).
        groups: (P,), such as the label of each place.
        count: How many.
    """
    order = [int(i) for i in np.argsort(-score, kind="stable") if np.isfinite(score[i])]
    chosen: list[int] = []
    seen: set[Any] = set()
    for i in order:
        if groups[i] not in seen and len(chosen) < count:
            chosen.append(i)
            seen.add(groups[i])
    for i in order:
        if len(chosen) >= count:
            break
        if i not in chosen:
            chosen.append(i)
    return chosen


def divergence(p: Array, q: Array) -> Array:
    """Return the Jensen–Shannon divergence of two distributions at each place, in bits: (P,) from 0 to 1."""
    middle = (p + q) / 2
    found: Array = (entropy(middle) - (entropy(p) + entropy(q)) / 2) / np.log(2)
    return found


def thinned(curves: Sequence[Mapping[int, float]], most: int = 80) -> dict[str, list[float]]:
    """Return the mean and the range over seeds of a logged value, at most so many steps of it.

    Args:
        curves: Values by step, one for each seed.
        most: Number of steps to keep.
    """
    steps = sorted(set(curves[0]).intersection(*curves[1:])) or sorted(set().union(*curves))
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    values = [[curve[step] for curve in curves if step in curve] for step in steps]
    return {
        "step": [float(step) for step in steps],
        "mean": [float(np.mean(some)) for some in values],
        "low": [float(min(some)) for some in values],
        "high": [float(max(some)) for some in values],
    }
