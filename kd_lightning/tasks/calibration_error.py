"""How far a classifier's probabilities are from how often it is right."""

from typing import Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from kd_lightning.outputs import AnyOutputs

BINS = 15
"""As many as Guo et al. use."""


class Confident(Protocol):
    """What the metric asks a task."""

    def confidence(self, outputs: AnyOutputs, target: Tensor) -> tuple[Tensor, Tensor] | None: ...


class CalibrationError(Metric):
    """Expected calibration error over 15 bins of equal width: Σ_b |right_b − confidence_b| / n (Guo et al., ICML 2017).

    https://arxiv.org/abs/1706.04599, equation 3; in [0, 1]. ``right_b`` counts the units of a bin whose most likely
    class is their label, ``confidence_b`` sums its probability at T = 1. NaN where no unit had a label.

    In place of torchmetrics' metric of that name, which keeps every unit: of an image's pixels, gigabytes.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    right: Tensor
    confidence: Tensor
    count: Tensor

    def __init__(self, task: Confident) -> None:
        super().__init__()
        self._task = task
        for name in ("right", "confidence", "count"):
            self.add_state(name, torch.zeros(BINS), dist_reduce_fx="sum")

    def update(self, outputs: AnyOutputs, target: Tensor) -> None:
        found = self._task.confidence(outputs, target)
        if found is None:
            return
        confidence, right = found
        bins = (confidence * BINS).long().clamp(0, BINS - 1)
        for state, values in (("right", right), ("confidence", confidence), ("count", torch.ones_like(confidence))):
            total = torch.zeros_like(self.count).index_add_(0, bins, values.to(self.count.dtype))
            setattr(self, state, getattr(self, state) + total)

    def compute(self) -> Tensor:
        return (self.right - self.confidence).abs().sum() / self.count.sum()
